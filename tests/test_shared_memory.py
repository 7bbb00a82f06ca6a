"""Ranks of one host exchange rows through memory: the same bits, the same errors, and nothing left behind."""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe import record
from megamoe.launch.forking.server import context
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel import symmetric
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport import host
from megamoe.parallel.transport.host import HostTransport
from megamoe.parallel.transport.pairs import Label, PairTransfer
from megamoe.shape import MoEShape
from tests.cases import make_batch, make_layer, oracle, split
from tests.protocol import FAULTS, search, wander
from tests.several_hosts import hosts

pytestmark = pytest.mark.skipif(not symmetric.available(), reason="ranks share memory on Linux and x86-64")
SHAPE = MoEShape(hidden=128, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)
TOKENS = 61


def near(group: EPGroup) -> list[int]:
    transport = group.transport
    assert isinstance(transport, HostTransport)
    return sorted(transport.host.near)


def own(shared: bool = True, deadline_s: float = 60.0) -> EPGroup:
    return EPGroup.of(dist.group.WORLD, deadline_s=deadline_s, shared_memory=shared)


def outputs(group: EPGroup, empty: int | None = None) -> list[Tensor]:
    """Three calls with one wave and three with several, the last recorded."""
    mine = make_batch(SHAPE, TOKENS).part(split(TOKENS, group.size, empty=empty)[group.rank])
    found = []
    for waves in (1, 3):
        layer = make_layer(SHAPE, group, waves=waves, name=f"waves{waves}")
        found += [layer(mine.hidden, mine.ids, mine.weights) for _ in range(2)]
        with record(group):
            found.append(layer(mine.hidden, mine.ids, mine.weights))
    return found


def test_python_that_ends_with_a_segment_still_in_use_says_nothing() -> None:
    """As a program does that keeps a model until its end: by then Python has taken this module's names away."""
    program = "import threading, megamoe.parallel.symmetric as s; threading.kept = s, s.SymmetricMemory(0, 2)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def is_right(by_rank: list[list[Tensor]]) -> bool:
    expected = oracle(SHAPE, make_batch(SHAPE, TOKENS), "mxfp4", "mxfp8")
    return all(torch.equal(torch.cat(call), expected) for call in zip(*by_rank, strict=True))


# ---- who shares ----


def all_share(group: EPGroup) -> tuple[list[int], list[Tensor]]:
    out = outputs(group, empty=1)
    return near(group), out


def test_ranks_of_one_host_share_memory(ranks: LocalRanks) -> None:
    found = ranks.run(all_share, size=3)
    assert [peers for peers, _ in found] == [[1, 2], [0, 2], [0, 1]]
    assert is_right([out for _, out in found])


def with_and_without(group: EPGroup, sizes: tuple[int, ...]) -> list[list[Tensor]]:
    """Both kinds of EPGroup of one process group in turn, first one without, and a few tokens in each as well."""
    few = make_batch(SHAPE, 3 * group.size).part(split(3 * group.size, group.size)[group.rank])
    found = []
    with hosts(group, sizes):
        for shared in (False, True, False, True):
            made = own(shared)
            found.append([*outputs(made), make_layer(SHAPE, made, name="few")(few.hidden, few.ids, few.weights)])
            assert bool(made.near) == (shared and group.rank < 2 and sizes[0] == 2)
    return found


@pytest.mark.parametrize("sizes", [(2,), (1, 1), (2, 1)], ids=str)
def test_groups_with_and_without_shared_memory_take_turns(ranks: LocalRanks, sizes: tuple[int, ...]) -> None:
    by_rank = ranks.run(with_and_without, sizes, size=sum(sizes))
    few = oracle(SHAPE, make_batch(SHAPE, 3 * sum(sizes)), "mxfp4", "mxfp8")
    for number, made in enumerate(zip(*by_rank, strict=True)):
        assert is_right([each[:-1] for each in made]), number
        assert torch.equal(torch.cat([each[-1] for each in made]), few), number


def without_messages(group: EPGroup) -> list[Tensor]:
    """As outputs(), where nothing can go through sockets once the ranks have met."""
    transport = group.transport
    assert isinstance(transport, HostTransport)
    transport.gather(torch.zeros(8, dtype=torch.uint8), Label("meeting", "counts"))

    def refuses(*_: object) -> PairTransfer:
        raise AssertionError("rows of the same host went through a socket")

    transport.pairs.expect = refuses  # type: ignore[assignment, method-assign]
    return outputs(group)


def test_rows_of_one_host_touch_no_socket(ranks: LocalRanks) -> None:
    assert is_right(ranks.run(without_messages, size=2))


def more_waves_than_words(group: EPGroup) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "MAX_WAVES", 1)
        return outputs(group)


def test_waves_without_a_word_go_through_sockets(ranks: LocalRanks) -> None:
    assert is_right(ranks.run(more_waves_than_words, size=2))


def late_exchanges(group: EPGroup) -> list[Tensor]:
    """After more exchanges than 32 bits count, of which the kernel sees the low half of a word."""
    transport = group.transport
    assert isinstance(transport, HostTransport)
    transport.host.exchange = 2**32 - 3
    return outputs(group)


def test_exchanges_are_counted_beyond_32_bits(ranks: LocalRanks) -> None:
    assert is_right(ranks.run(late_exchanges, size=2))


def two_hosts(group: EPGroup) -> tuple[list[int], list[Tensor]]:
    symmetric.host_key, kept = (lambda: f"host{group.rank // 2}"), symmetric.host_key
    try:
        out = outputs(group)
    finally:
        symmetric.host_key = kept
    return near(group), out


def test_two_hosts_of_two_ranks_share_within_each(ranks: LocalRanks) -> None:
    found = ranks.run(two_hosts, size=4)
    assert [peers for peers, _ in found] == [[1], [0], [3], [2]]
    assert is_right([out for _, out in found])


def one_will_not(group: EPGroup) -> tuple[list[int], list[Tensor]]:
    mine = own(shared=True)
    if group.rank == 2:  # as a rank of another user, whose files may not be opened
        symmetric.host_key, kept = (lambda: "elsewhere"), symmetric.host_key
        try:
            out = outputs(mine)
        finally:
            symmetric.host_key = kept
    else:
        out = outputs(mine)
    return near(mine), out


def test_a_rank_that_cannot_share_is_reached_by_messages(ranks: LocalRanks) -> None:
    found = ranks.run(one_will_not, size=3)
    assert [peers for peers, _ in found] == [[1], [0], []]
    assert is_right([out for _, out in found])


def nothing_is_granted(group: EPGroup) -> tuple[list[int], list[Tensor]]:
    def refuses(name: str) -> int:
        raise OSError(f"no file {name}")

    kept = os.memfd_create
    if group.rank == 1:
        os.memfd_create = refuses  # type: ignore[assignment]
    try:
        out = outputs(group)
    finally:
        os.memfd_create = kept
    return near(group), out


def test_where_a_system_grants_no_memory_rows_go_through_sockets(ranks: LocalRanks) -> None:
    found = ranks.run(nothing_is_granted, size=3)
    assert [peers for peers, _ in found] == [[2], [], [0]]
    assert is_right([out for _, out in found])


def test_a_rank_that_is_granted_no_memory_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host, "SymmetricMemory", mock.Mock(side_effect=OSError("no file")))
    assert host._own_memory(3, 4) is None
    assert "rank 3 shares no memory with others of its host, rows go through sockets: no file" in caplog.text


def addresses(group: EPGroup) -> tuple[list[int], list[Tensor]]:
    """A process that may have a few GB of addresses."""
    kept = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    if group.rank == 1:
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, kept[1]))
    try:
        out = outputs(group)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)
    return near(group), out


def test_where_addresses_are_limited_rows_go_through_sockets(ranks: LocalRanks) -> None:
    found = ranks.run(addresses, size=2)
    assert [peers for peers, _ in found] == [[], []]
    assert is_right([out for _, out in found])


def test_regions_of_many_ranks_fit_into_the_addresses_of_a_process() -> None:
    for size in (2, 8, 1024):
        assert size * len(symmetric.REGIONS) * symmetric.region_bytes(size) <= 2**46 + 2**30


def test_every_word_page_and_region_has_a_place_of_its_own_in_a_segment() -> None:
    words, layout = symmetric.Words(3), symmetric.Layout(3, symmetric.region_bytes(3))
    pages = [words.page(exchange, sender) for exchange in (6, 7) for sender in range(3)]
    rows = [words.rows(r, wave, sender) for r in range(2) for wave in range(symmetric.MAX_WAVES) for sender in range(3)]
    assert sorted(pages + rows) == list(range(words.count))
    sizes = [(0, 16), (layout.words, 8 * words.count)]  # the token, and words of 8 bytes
    sizes += [(layout.place(each), symmetric.PLACE_BYTES) for each in range(2)]
    sizes += [(layout.region(each), layout.region_bytes) for each in range(len(symmetric.REGIONS))]
    ends = [begin + size for begin, size in sizes]
    assert all(end <= begin for end, (begin, _) in zip(ends, [*sizes[1:], (layout.total, 0)], strict=True))
    assert layout.place(0) % mmap.PAGESIZE == layout.region(0) % mmap.PAGESIZE == layout.total % mmap.PAGESIZE == 0


def test_a_segment_is_mapped_by_its_token_its_size_and_its_host_alone() -> None:
    other = symmetric.SymmetricMemory(1, 2)
    host_of, process, file, total, token = other.card().decode().split()
    wrong = {
        "host": ("other", process, file, total, token),
        "process": (host_of, str(2**22 + 1), file, total, token),
        "file": (host_of, process, str(os.memfd_create("other")), total, token),
        "size": (host_of, process, file, "4096", token),
        "token": (host_of, process, file, total, "00" * 16),
    }
    for what, card in wrong.items():
        with closing(symmetric.SymmetricMemory(0, 2)) as memory:
            assert not memory.attach(1, " ".join(card).encode()), what
            assert list(memory.peers) == [0], what
    os.close(int(wrong["file"][2]))
    with closing(symmetric.SymmetricMemory(0, 2)) as memory, closing(other):
        assert memory.attach(1, other.card())
        memory.peers[1].set(5, 2**40)
        assert other.wait(5, 2**40, 0.0, spin=False)
        assert not other.wait(5, 2**40 + 1, 0.01, spin=True)


def by_messages(group: EPGroup) -> tuple[list[int], list[Tensor]]:
    """Beside layers of the same process group that do share."""
    del group
    out = [each for shared in (True, False, True) for each in outputs(own(shared=shared))]
    mine = own(shared=False)
    return near(mine), out + outputs(mine)


def test_memory_can_be_refused(ranks: LocalRanks) -> None:
    found = ranks.run(by_messages, size=2)
    assert [peers for peers, _ in found] == [[], []]
    assert is_right([out for _, out in found])


def two_groups(group: EPGroup) -> tuple[int, list[Tensor]]:
    del group
    first, second = own(), own()
    out = outputs(first) + outputs(second)
    assert isinstance(first.transport, HostTransport)
    assert isinstance(second.transport, HostTransport)
    return int(first.transport.host is second.transport.host), out


def test_groups_of_one_process_group_share_its_memory(ranks: LocalRanks) -> None:
    found = ranks.run(two_groups, size=2)
    assert [alike for alike, _ in found] == [1, 1]
    assert is_right([out for _, out in found])


# ---- what it takes ----


def many_experts(group: EPGroup) -> tuple[bool, Tensor]:
    """Pages longer than a place in memory."""
    shape = MoEShape(hidden=32, intermediate=32, num_experts=3000, topk=2)
    layer = make_layer(shape, group)
    batch = make_batch(shape, 6)
    mine = batch.part(split(6, group.size)[group.rank])
    out = layer(mine.hidden, mine.ids, mine.weights)
    return near(group) != [], out


def test_pages_longer_than_their_place_come_in_parts(ranks: LocalRanks) -> None:
    found = ranks.run(many_experts, size=2)
    shape = MoEShape(hidden=32, intermediate=32, num_experts=3000, topk=2)
    assert all(shared for shared, _ in found)
    assert torch.equal(torch.cat([out for _, out in found]), oracle(shape, make_batch(shape, 6), "mxfp4", "mxfp8"))


def grows(group: EPGroup) -> list[int]:
    """Bytes in use after many calls of few tokens, and files of shared memory that are open."""
    gc.collect()  # earlier tests' groups
    layer, batch = make_layer(SHAPE, group), make_batch(SHAPE, 1)
    sizes = []
    for calls in (50, 300):
        for _ in range(calls):
            layer(batch.hidden, batch.ids, batch.weights)
        sizes += [group.workspace.memory_bytes, len(segments())]
    return sizes


def segments() -> list[str]:
    """Files of shared memory that this process has open."""
    files = Path("/proc/self/fd")
    return [
        target for each in files.iterdir() if "memfd:megamoe" in (target := os.readlink(each) if each.exists() else "")
    ]


def test_calls_of_one_token_take_nothing_more(ranks: LocalRanks) -> None:
    for first, files, later, files_later in ranks.run(grows, size=2):
        assert first == later
        assert files == files_later


def closes(group: EPGroup) -> list[int]:
    """Mapped segments while a group of one's own is in use, and after it."""
    del group
    gc.collect()  # earlier tests' groups
    world = dist.new_group([0, 1])
    mine = EPGroup.of(world)
    batch, before = make_batch(SHAPE, 3), mapped()
    layer = make_layer(SHAPE, mine)
    layer(batch.hidden, batch.ids, batch.weights)
    during = mapped()
    del layer, mine
    dist.destroy_process_group(world)
    del world
    gc.collect()
    return [during - before, mapped() - before]


def mapped() -> int:
    return sum("memfd:megamoe" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_segments_go_with_their_group(ranks: LocalRanks) -> None:
    assert ranks.run(closes, size=2) == [[2, 0], [2, 0]]


# ---- a rank is lost ----


def loses_one(rank: int, size: int, place: str) -> None:
    """A group without heartbeats, whose last rank is killed while the others wait for it."""
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=size)
    mine = EPGroup.of(dist.group.WORLD, deadline_s=20.0)
    layer, batch = make_layer(SHAPE, mine), make_batch(SHAPE, 3)
    layer(batch.hidden, batch.ids, batch.weights)
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(PeerError) as lost:
        layer(batch.hidden, batch.ids, batch.weights)
    said = {"rank": lost.value.rank, "reason": lost.value.reason, "took_s": time.monotonic() - begun}
    Path(place, f"rank{rank}").write_text(json.dumps(said))


def test_a_rank_that_is_killed_is_named_without_heartbeats_and_at_once(tmp_path: Path) -> None:
    processes = [context(forked=True).Process(target=loses_one, args=(rank, 3, str(tmp_path))) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, -signal.SIGKILL]
    for rank in (0, 1):
        said = json.loads((tmp_path / f"rank{rank}").read_text())
        assert (said["rank"], said["reason"]) == (2, "its process is gone")
        assert said["took_s"] < 5.0


def stops(group: EPGroup) -> tuple[str, float]:
    mine = EPGroup.of(dist.group.WORLD, deadline_s=0.5)
    layer, batch = make_layer(SHAPE, mine), make_batch(SHAPE, 3)
    layer(batch.hidden, batch.ids, batch.weights)
    begun = time.monotonic()
    if group.rank == 1:
        return "", 0.0
    with pytest.raises(PeerError) as late:
        layer(batch.hidden, batch.ids, batch.weights)
    return f"{late.value.rank}: {late.value.reason}", time.monotonic() - begun


def test_a_rank_that_does_not_come_is_named_at_the_deadline() -> None:
    with LocalRanks(2, threads_per_rank=1) as ranks:
        (said, took), _ = ranks.run(stops, size=2)
    assert said == "1: its rows did not come in time"
    assert 0.4 < took < 3.0


# ---- the protocol ----


@pytest.mark.parametrize(
    ("size", "kinds"), [(2, "wwewsssweess"), (2, "sseoosowwos"), (3, "sse"), (3, "woo"), (3, "osw")], ids="{}".format
)
def test_no_order_of_steps_reads_another_calls_rows_or_stands_still(size: int, kinds: str) -> None:
    found = search(size, kinds)
    assert found.wrong == ""
    assert found.states > 100


@pytest.mark.parametrize(("size", "kinds"), [(4, "wssewoosessw"), (6, "osewssewoow")], ids="{}".format)
def test_no_order_that_was_drawn_does_either(size: int, kinds: str) -> None:
    found = wander(size, kinds, walks=60)
    assert found.wrong == ""
    assert found.states > 1000


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [(fault, "sseess") for fault in FAULTS]
    + [(fault, "wweeww") for fault in FAULTS if not fault.startswith("results")]
    + [(fault, "wsseeswwss") for fault in FAULTS],
    ids="{}".format,
)
def test_the_search_finds_faults_that_are_put_in(fault: str, kinds: str) -> None:
    assert search(2, kinds, fault).wrong
    assert wander(3, kinds, fault, walks=200).wrong
