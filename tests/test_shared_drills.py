"""One drill of each kind with ranks that share a host's memory; nothing is left; where little memory may be shared.

`python -m benchmarks.drills --place host` runs more of the drills.
"""

from __future__ import annotations

import gc
import json
import logging
import mmap
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks.drills.drill import FAULTS, GROUP, Plan, judge, play
from benchmarks.drills.places import HostPlace, on_host, segments_of
from megamoe.launch.cluster.spawn import SpawnHandle, SpawnPool
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel import symmetric
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.host import HostTransport
from tests.test_drills import family
from tests.test_shared_memory import is_right, outputs

pytestmark = pytest.mark.skipif(not symmetric.available(), reason="ranks share memory on Linux and x86-64")


# ---- a rank is struck ----


def plan_of(fault: str) -> Plan:
    return replace(Plan.draw(fault, random.Random(fault), deadline_s=1.5, place="host"), ranks=3, victim=1)


@contextmanager
def three() -> Iterator[list[SpawnHandle]]:
    with SpawnPool(3, deadline_s=60.0, threads=1) as pool, ThreadPoolExecutor(3) as openers:
        yield list(openers.map(lambda number: pool.open(number, 60.0), range(3)))


@pytest.fixture(scope="module")
def field() -> Iterator[tuple[HostPlace, list[SpawnHandle]]]:
    """Three ranks for one drill after another; nothing of them is left."""
    before = family()
    with on_host(3) as place:
        with three() as handles:
            yield place, handles
        assert not place.left()
    assert family() <= before


# the one that is stopped does not come back, and the last drill leaves nobody
ORDER = [fault for fault in FAULTS if fault not in ("stop", "kill")] + ["stop"]


@pytest.mark.parametrize("fault", ORDER)
def test_every_survivor_names_the_rank_that_was_struck(field: tuple[HostPlace, list[SpawnHandle]], fault: str) -> None:
    place, handles = field
    plan = plan_of(fault)
    found = judge(plan, *play(plan, place, handles), left="")
    assert found.held, json.dumps(asdict(found), indent=1)


@pytest.mark.parametrize("fault", ["kill", GROUP])
def test_nothing_is_left_where_one_was_killed_or_all_were(fault: str) -> None:
    before, plan = family(), plan_of(fault)
    with on_host(3) as place:
        with three() as handles:
            struck, endings = play(plan, place, handles)
        found = judge(plan, struck, endings, place.left())
    assert found.held, json.dumps(asdict(found), indent=1)
    assert family() <= before


STARTS = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from benchmarks.drills.drill import Plan, call_until_it_ends
from megamoe.launch.cluster.spawn import SpawnPool
from megamoe.launch.cluster.worker import Rendezvous

if __name__ == "__main__":
    folder, pool = Path(sys.argv[1]), SpawnPool(2, threads=1)
    with ThreadPoolExecutor(2) as openers:
        handles = list(openers.map(lambda number: pool.open(number, 60.0), range(2)))
    address, port = handles[0].call("open_store").result(60)
    for joined in [h.call("join", Rendezvous(address, port, 1, rank, 2)) for rank, h in enumerate(handles)]:
        joined.result(60)
    plan = Plan("group", 2, 0, 0, "linear1", 0.0, 60.0, "host")
    for handle in handles:
        handle.call("run", call_until_it_ends, plan, folder)
    while len(list(folder.glob("rank-*"))) < 2:
        time.sleep(0.01)
    print(*(handle.pid for handle in handles), flush=True)
    time.sleep(60)
"""


def test_ranks_end_and_leave_nothing_when_who_started_them_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "starts.py"
    script.write_text(STARTS)
    place = HostPlace()
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as starter:
        assert starter.stdout is not None
        pids = [int(pid) for pid in starter.stdout.readline().split()]
        assert len(pids) == 2
        place.look(pids)
        held = [os.pidfd_open(pid) for pid in pids]
        for pid in (starter.pid, *pids):
            os.kill(pid, signal.SIGKILL)
    for pidfd in held:
        assert_ended(pidfd)
    assert not place.left()


def assert_ended(pidfd: int) -> None:
    """Waits for a process that is not this one's child."""
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        assert poll.poll(20_000), "a rank is there still"
    finally:
        os.close(pidfd)


# ---- what is left is found ----


def test_what_is_left_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    place = HostPlace()
    memory = symmetric.SymmetricMemory(0, 1)
    sockets = socket.socketpair()
    try:
        assert segments_of(os.getpid())
        place.look([os.getpid()])
        (tmp_path / f"of-{os.getpid()}").touch()
        (tmp_path / "of-somebody-else").touch()
        said = place.left()
    finally:
        memory.close()
        for each in sockets:
            each.close()
    for what in (f"processes [{os.getpid()}]", "segments ['", "sockets ['", f"of-{os.getpid()}'"):
        assert what in said
    assert "somebody" not in said
    del memory
    gc.collect()
    assert "segments" not in HostPlace.left(place)


# ---- little memory, or none ----


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def refused(group: EPGroup, how: str) -> tuple[int, list[str], list[Tensor]]:
    """Rank 1 gets no shared memory: refused by the system, or no addresses for it -> ranks near, lines, outputs."""
    gc.collect()
    lines, log = Lines(), logging.getLogger("megamoe.parallel.transport.host")
    log.addHandler(lines)
    limit, create = resource.getrlimit(resource.RLIMIT_AS), os.memfd_create

    def no_file(name: str) -> int:
        raise OSError(1, f"no file {name}")

    if group.rank == 1 and how == "addresses":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limit[1]))
    if group.rank == 1 and how == "memfd":
        os.memfd_create = no_file  # type: ignore[assignment]
    try:
        out = outputs(group)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        os.memfd_create = create
        log.removeHandler(lines)
    assert isinstance(group.transport, HostTransport)
    return len(group.transport.host.near), lines.said, out


@pytest.mark.parametrize("how", ["addresses", "memfd"])
def test_where_no_memory_is_granted_rows_go_through_sockets_and_a_line_says_so(ranks: LocalRanks, how: str) -> None:
    found = ranks.run(refused, how, size=2)
    assert [near for near, _, _ in found] == [0, 0]
    assert found[0][1] == []
    assert len(found[1][1]) == 1
    assert "rank 1 shares no memory with others of its host, rows go through sockets" in found[1][1][0]
    assert is_right([out for _, _, out in found])


SMALL_SHM = """
import os
import torch.multiprocessing as mp, torch.distributed as dist, torch, sys
from megamoe.parallel.group import EPGroup
from benchmarks.drills.places import near
from tests.cases import make_batch, make_layer, oracle, split
from megamoe.shape import MoEShape

SHAPE = MoEShape(512, 64, 8, 4)
TOKENS = 24000  # 48 MB of results on each of two ranks, and as much of tokens

def work(rank, place):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    group = EPGroup.of(dist.group.WORLD, deadline_s=60.0)
    layer = make_layer(SHAPE, group, weight_format="bf16", dispatch_format="bf16")
    batch = make_batch(SHAPE, TOKENS).part(split(TOKENS, 2)[rank])
    layer(batch.hidden, batch.ids, batch.weights)
    assert near(group) == 1
    print("shared", layer.last_call.bytes_sent, flush=True)
    dist.destroy_process_group()

if __name__ == "__main__":
    room = os.statvfs("/dev/shm")
    print("room", room.f_frsize * room.f_blocks, flush=True)
    mp.spawn(work, (sys.argv[1],), nprocs=2)
"""


@pytest.mark.parametrize("size", ["64m", "none"])
def test_shared_memory_needs_no_room_of_dev_shm(tmp_path: Path, size: str) -> None:
    """In a mount namespace of its own, where /dev/shm has 64 MB as in a container, or is read-only and empty."""
    script = tmp_path / "small_shm.py"
    script.write_text(SMALL_SHM)
    options = "size=64m" if size == "64m" else "ro,size=4k"
    command = f"mount -t tmpfs -o {options} tmpfs /dev/shm && exec {sys.executable} {script} {tmp_path / 'store'}"
    root = Path(__file__).parents[1]
    try:
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespace of one's own here")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    room = next(int(value) for name, value in lines if name == "room")
    sent = [int(value) for name, value in lines if name == "shared"]
    assert room <= 64 << 20
    assert len(sent) == 2
    assert sum(sent) > room
