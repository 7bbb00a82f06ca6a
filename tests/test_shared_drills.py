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
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks.drills.drill import FAULTS, GROUP, Field, Plan
from benchmarks.drills.places import HostPlace, on_host, segments_of
from megamoe.launch.cluster.spawn import SpawnPool
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel import symmetric
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.host import HostTransport
from tests.test_shared_memory import is_right, outputs

pytestmark = pytest.mark.skipif(not symmetric.available(), reason="ranks share memory on Linux and x86-64")


# ---- a rank is struck ----


def plan_of(fault: str) -> Plan:
    return replace(Plan.draw(fault, random.Random(fault), deadline_s=1.5, place="host"), ranks=3, victim=1)


@pytest.fixture(scope="module")
def field() -> Iterator[Field]:
    """Nothing is left of the ranks, which the last drill kills all together."""
    with on_host(3) as place:
        with SpawnPool(3, deadline_s=60.0, threads=1) as pool:
            yield Field(pool, place, 3)
        assert not place.left()


@pytest.mark.parametrize("fault", [*FAULTS, GROUP])
def test_every_survivor_names_the_rank_that_was_struck(field: Field, fault: str) -> None:
    found = field.drill(plan_of(fault))
    assert found.held, json.dumps(asdict(found), indent=1)


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
import os, subprocess, sys
import torch
import torch.distributed as dist
from benchmarks.drills.places import near
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape
from tests.cases import make_batch, make_layer, split

SHAPE = MoEShape(512, 64, 8, 4)
TOKENS = 24000

def work(rank, place):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    group = EPGroup.of(dist.group.WORLD, deadline_s=60.0)
    layer = make_layer(SHAPE, group, weight_format="bf16", dispatch_format="bf16")
    batch = make_batch(SHAPE, TOKENS).part(split(TOKENS, 2)[rank])
    layer(batch.hidden, batch.ids, batch.weights)
    os.write(1, f"shared {near(group)} {layer.last_call.bytes_sent}\\n".encode())  # whole, whatever the other does
    os._exit(0)

for number, options in enumerate(("size=64m", "ro,size=4k")):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", "/dev/shm"], check=True)
    room = os.statvfs("/dev/shm")
    print("room", room.f_frsize * room.f_blocks, flush=True)
    ranks = [os.fork() or work(rank, f"{sys.argv[1]}-{number}") for rank in range(2)]
    for pid in ranks:
        assert os.waitpid(pid, 0)[1] == 0, options
"""


def test_shared_memory_needs_no_room_in_dev_shm(tmp_path: Path) -> None:
    """In a mount namespace of its own, where /dev/shm has 64 MB as in a container, then is read-only and empty."""
    script = tmp_path / "small_shm.py"
    script.write_text(SMALL_SHM)
    try:
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mount namespace of one's own here")
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, str(script), str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["room", "shared", "shared"] * 2
    for begin in (0, 3):
        (_, room), *ranks = lines[begin : begin + 3]
        assert int(room) <= 64 << 20
        assert [near for _, near, _ in ranks] == ["1", "1"]
        assert sum(int(sent) for *_, sent in ranks) > int(room)
