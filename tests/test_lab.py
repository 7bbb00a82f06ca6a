"""The lab: links of the bandwidth asked for, taken down however it ends, swept where it was killed; faults are felt."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megamoe.launch.lab.faults import cut, find, format_rate, heal, links, slow
from megamoe.launch.lab.namespaces import (
    NAMESPACES,
    PREFIX,
    Host,
    burst_bytes,
    check_lab,
    hosts_of,
    keep,
    lab,
    owner,
    parse_rate,
    remove,
    runs,
    sweep,
)
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.pairs import Label
from megamoe.shape import MoEShape
from tests.cases import make_batch, oracle, split
from tests.test_layer import forward


def possible() -> str:
    """Why this machine can hold no lab; "" where it can."""
    try:
        check_lab()
        with lab(1, "1gbit"):
            return ""
    except (ValueError, RuntimeError) as refusal:
        return str(refusal)


WHY_NOT = possible()
needs_lab = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.mark.parametrize(("text", "bits"), [("1gbit", 1e9), ("2.5Gbit", 2.5e9), ("500mbit", 5e8), ("64kbit", 64e3)])
def test_rates_are_read_as_tc_writes_them(text: str, bits: float) -> None:
    assert parse_rate(text) == bits


@pytest.mark.parametrize("text", ["", "1", "gbit", "1gbps", "-1gbit", "0gbit", "1 gbit x"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate such as 1gbit"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["1gbit", "2.5gbit", "500mbit", "64.5kbit", "0.5kbit"])
def test_rates_are_written_as_they_are_read(text: str) -> None:
    assert format_rate(parse_rate(text)) == text


def names(run_hosts: list[Host]) -> set[str]:
    return {host.namespace or "" for host in run_hosts}


@needs_lab
def test_two_labs_stand_side_by_side_and_nothing_is_left() -> None:
    with lab(2, "1gbit") as one, lab(3, "100mbit") as other:
        assert not names(one) & names(other)
        assert len(runs()) >= 2
        assert all((NAMESPACES / name).exists() for name in names(one) | names(other))
    assert not any((NAMESPACES / name).exists() for name in names(one) | names(other))


@needs_lab
def test_ranks_share_a_host_and_its_link_where_they_are_to() -> None:
    with lab(5, "1gbit", ranks_per_host=2) as hosts:
        run = str(hosts[0].lab)
        assert [each.namespace for each in hosts] == [f"{run}-r0x2"] * 2 + [f"{run}-r2x2"] * 2 + [f"{run}-r4"]
        assert [each.address for each in hosts] == [f"10.77.0.{first}" for first in (1, 1, 3, 3, 5)]
        assert hosts_of(run) == hosts
        slow(run, 3, "10mbit")
        assert [link.slow for link in links(run)] == [False, False, True, True, False]
        assert cut(run, 0).cut
        heal(run, 2)
        assert [(link.slow, link.cut) for link in links(run)] == [(False, True)] * 2 + [(False, False)] * 3
    assert run not in runs()


@needs_lab
def test_a_lab_is_taken_down_when_its_block_raises() -> None:
    with pytest.raises(KeyError), lab(1, "1gbit") as hosts:
        raise KeyError
    assert not any((NAMESPACES / name).exists() for name in names(hosts))


KILLED = """
import time
from megamoe.launch.lab.namespaces import lab
with lab(2, "1gbit") as hosts:
    print(hosts[0].namespace, flush=True)
    time.sleep(60)
"""


@needs_lab
def test_the_next_start_sweeps_what_a_killed_one_left() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        run = name.rpartition("-")[0]
        assert run in runs()
        assert run not in sweep(), "a lab whose process lives is left alone"
        process.send_signal(signal.SIGKILL)
    assert run in sweep()
    assert not list(NAMESPACES.glob(f"{run}-*"))


@needs_lab
def test_a_sweep_leaves_kept_labs_and_takes_only_the_lab_that_is_named() -> None:
    name = f"kept-{os.getpid()}"
    kept, other = keep(1, "1gbit", name=name), keep(1, "1gbit", name=f"{name}-r0")
    try:
        assert kept[0].lab == PREFIX + name
        with lab(1, "1gbit") as owned:
            assert kept[0].lab not in sweep()
            assert owner(str(owned[0].lab)).process == os.getpid()
        remove(str(other[0].lab))
        assert other[0].lab not in runs()
        assert hosts_of(find(name)) == kept
    finally:
        for each in (kept, other):
            remove(str(each[0].lab))
    assert not [run for run in runs() if name in run]


def transfer(group: EPGroup, num_bytes: int) -> float:
    """Seconds that num_bytes take to the other rank and, at the same time, back; the second time, when links are up."""
    assert group.transport is not None
    counts = [int(rank != group.rank) for rank in range(2)]
    out, back = torch.ones(1, num_bytes, dtype=torch.uint8), torch.zeros(1, num_bytes, dtype=torch.uint8)
    took = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        moving = group.transport.expect(back, counts, Label("lab", "dispatch", 0))
        moving.send(out, counts)
        moving.wait()
        moving.finish()
        took = time.perf_counter() - begun
    assert torch.equal(out, back)
    return took


@needs_lab
def test_both_directions_have_the_bandwidth_asked_for() -> None:
    num_bytes = 5_000_000
    with lab(2, "200mbit") as hosts, LocalRanks(2, threads_per_rank=1, hosts=hosts) as ranks:
        passes = [max(ranks.run(transfer, num_bytes)) for _ in range(3)]
    at_once = burst_bytes(200e6)
    assert 0.95 * (num_bytes - at_once) * 8 / 200e6 < min(passes)
    assert min(passes) < 1.5 * num_bytes * 8 / 200e6  # a busy machine slows a pass down


@needs_lab
def test_the_layer_gives_the_oracles_bits_over_shaped_links() -> None:
    shape = MoEShape(128, 96, 10, 4, 3.0)
    batch = make_batch(shape, 61)
    with lab(3, "50mbit") as hosts, LocalRanks(3, threads_per_rank=1, hosts=hosts) as ranks:
        parts = ranks.run(forward, shape, batch, split(61, 3), 3)
    assert torch.equal(torch.cat(parts), oracle(shape, batch, "mxfp4", "mxfp8"))


@needs_lab
def test_a_delay_is_real_or_refused_by_name() -> None:
    said = ""
    try:
        with lab(2, "1gbit", latency_ms=20) as hosts, LocalRanks(2, threads_per_rank=1, hosts=hosts) as ranks:
            assert max(ranks.run(transfer, 100)) > 0.02
    except ValueError as refusal:
        said = str(refusal)
    assert not said or "latency_ms 20 needs the kernel module sch_netem" in said
    assert not [run for run in runs() if f"-{os.getpid()}-" in run]


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="need Linux network namespaces, this is darwin"):
        check_lab()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    with pytest.raises(ValueError, match="need tc: install iproute2"):
        check_lab()
    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="need root"):
        check_lab()


@pytest.mark.parametrize(
    ("arguments", "latency_ms", "message"),
    [
        ((0, "1gbit"), 0, "a lab holds 1 to 250 ranks, got 0"),
        ((251, "1gbit"), 0, "got 251"),
        ((2, "fast"), 0, "link 'fast' is not a rate"),
        ((2, "1gbit"), -1, "latency_ms must be between 0 and 60000, got -1"),
    ],
)
def test_wrong_labs_are_refused(arguments: tuple[int, str], latency_ms: float, message: str) -> None:
    with pytest.raises(ValueError, match=message), lab(*arguments, latency_ms=latency_ms):
        pass


def test_a_host_holds_a_rank_at_least() -> None:
    with pytest.raises(ValueError, match="ranks_per_host must be at least 1, got 0"), lab(2, "1gbit", ranks_per_host=0):
        pass


# ---- faults ----


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[list[Host], LocalRanks]]:
    """Three ranks that run in a lab of 200 Mbit/s."""
    with lab(3, "200mbit") as hosts, LocalRanks(3, threads_per_rank=1, hosts=hosts) as ranks:
        yield hosts, ranks


@pytest.fixture
def healthy(running: tuple[list[Host], LocalRanks]) -> Iterator[tuple[str, LocalRanks]]:
    """The running lab's name and its ranks; healed after the test."""
    hosts, ranks = running
    yield str(hosts[0].lab), ranks
    for rank in range(3):
        heal(str(hosts[0].lab), rank)


def exchange(_: EPGroup, run: str, victim: int | None, deadline_s: float) -> tuple[int, float] | None:
    """Pages between all ranks; rank 0 cuts the victim off after the first. Who was lost after how many seconds."""
    group = EPGroup.of(dist.group.WORLD, deadline_s=deadline_s)
    assert group.transport is not None
    page = torch.zeros(8, dtype=torch.uint8)
    for number in range(3):
        try:
            group.transport.gather(page, Label("lab", "counts"))
        except PeerError as lost:
            return lost.rank, lost.waited_s
        if number == 0 and group.rank == 0 and victim is not None:
            cut(run, victim)
    return None


@needs_lab
def test_a_rank_that_is_cut_off_goes_silent_and_is_named_by_the_others(healthy: tuple[str, LocalRanks]) -> None:
    run, ranks = healthy
    assert ranks.run(exchange, run, None, 20.0) == [None] * 3
    for lost in ranks.run(exchange, run, 1, 2.0)[::2]:
        assert lost is not None
        rank, waited_s = lost
        assert rank == 1
        assert 1.9 < waited_s < 5, "the deadline tells, and no error of the network before it"
    assert [link.cut for link in links(run)] == [False, True, False]
    heal(run, 1)
    assert [link.cut for link in links(run)] == [False, False, False]
    assert ranks.run(exchange, run, None, 20.0) == [None] * 3


@needs_lab
def test_a_link_that_is_slowed_down_takes_longer_by_the_ratio_until_it_is_healed(
    healthy: tuple[str, LocalRanks],
) -> None:
    run, ranks = healthy
    num_bytes, seconds = 2_000_000, []
    for _ in range(2):  # as built, slowed down by 8, healed
        seconds.append(max(ranks.run(transfer, num_bytes, size=2)))
        assert slow(run, 1, "25mbit").slow
        assert [link.bits_per_s for link in links(run)] == [200e6, 25e6, 200e6]
        seconds.append(max(ranks.run(transfer, num_bytes, size=2)))
        heal(run, 1)
        assert [link.bits_per_s for link in links(run)] == [200e6] * 3
    fast, slowed = min(seconds[::2]), min(seconds[1::2])  # other work on the machine only adds
    assert 0.95 * (num_bytes - burst_bytes(25e6)) * 8 / 25e6 < slowed < 1.5 * num_bytes * 8 / 25e6
    assert slowed > 4 * fast, "8 by the rates, less what a bucket lets through at once and a busy machine's delays"
