"""Ranks forked by a server that has imported torch: what they have of it and what not, and when they are spawned."""

from __future__ import annotations

import os
import random
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megamoe.launch.forking import server
from megamoe.launch.forking.server import SPAWN, starting
from megamoe.launch.forking.surroundings import surroundings, unsearched_folder
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.group import EPGroup

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux alone")


def seen(group: EPGroup, folder: Path) -> dict[str, Any]:
    """Of one rank: its server, what it draws, and where it prints."""
    server = psutil.Process().parents()[0]
    os.write(1, f"rank {group.rank}\n".encode())
    return {
        "server": server.pid,
        "servers_parent": server.ppid(),
        "threads": server.num_threads(),
        "draws": (random.random(), float(np.random.rand()), os.urandom(4)),
        "product": float((np.ones((400, 400)) @ np.ones((400, 400))).sum()),
        "drawn_by_torch": torch.rand(1).item(),
        "folder": Path.cwd() == folder,
        "columns": os.environ.get("COLUMNS"),
        "given": os.environ.get("MEGAMOE_TEST_GIVEN"),
    }


def test_ranks_share_a_server_of_one_thread_and_draw_different_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = tmp_path / "printed"
    kept = os.dup(1)
    try:
        with printed.open("wb") as file:
            os.dup2(file.fileno(), 1)
            with LocalRanks(2, threads_per_rank=1) as ranks:
                first, second = ranks.run(seen, tmp_path)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert first["server"] == second["server"] != os.getpid()
    assert first["servers_parent"] == os.getpid()
    assert first["threads"] == 1
    assert not set(first["draws"]) & set(second["draws"])
    assert first["drawn_by_torch"] == second["drawn_by_torch"]  # as in fresh processes
    assert first["product"] == second["product"] == 400**3
    assert first["folder"]
    assert second["folder"]
    assert sorted(printed.read_text().split("\n")) == ["", "rank 0", "rank 1"]


def test_a_rank_is_spawned_where_its_environment_is_not_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: LocalRanks
) -> None:
    assert all(psutil.Process(pid).ppid() != os.getpid() for pid in ranks.pids)
    monkeypatch.setenv("MEGAMOE_TEST_GIVEN", "this")
    with LocalRanks(1, threads_per_rank=1) as alone:
        assert psutil.Process(alone.pids[0]).ppid() == os.getpid()
        assert alone.run(seen, tmp_path)[0]["given"] == "this"


def test_a_variable_that_no_import_reads_is_handed_to_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "123")
    with LocalRanks(1, threads_per_rank=1) as alone:
        assert psutil.Process(alone.pids[0]).ppid() != os.getpid()
        assert alone.run(seen, tmp_path)[0]["columns"] == "123"
    monkeypatch.delenv("COLUMNS")
    with LocalRanks(1, threads_per_rank=1) as alone:
        assert alone.run(seen, tmp_path)[0]["columns"] is None


# ---- what a process inherits ----


@contextmanager
def variable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "7")
        yield


@contextmanager
def mask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@contextmanager
def limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0 if before[0] else before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


@contextmanager
def cores() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("change", [variable, mask, limit, cores], ids=lambda change: change.__name__)
def test_whatever_a_fresh_process_would_inherit_is_compared(change: Callable[[], Any]) -> None:
    if change is cores and len(os.sched_getaffinity(0)) == 1:
        pytest.skip("this process has one core")
    if change is limit and resource.getrlimit(resource.RLIMIT_CORE) == (0, 0):
        pytest.skip("no core file can be allowed here")
    before = surroundings()
    with change():
        assert surroundings() != before
    assert surroundings() == before


def test_a_fork_of_this_process_is_told_apart() -> None:
    before, (reads, writes) = surroundings(), os.pipe()
    if not (pid := os.fork()):
        os.write(writes, b"same" if surroundings() == before else b"another")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reads, 10) == b"another"
    os.close(reads)
    os.close(writes)


# ---- a server that ends ----

KILLED = """
import os, psutil
from megamoe.launch.forking import server as forking
from megamoe.launch.ranks import LocalRanks, RankFailedError
from tests.test_forking import where

if __name__ == "__main__":
    forking._READY_S = 90.0  # a server that is slow on a busy machine is waited for
    found = []
    for _ in range(1):
        with LocalRanks(2, threads_per_rank=1) as ranks:
            processes = [psutil.Process(pid) for pid in ranks.pids]
            server = processes[0].parent()
            server.kill()
            left = psutil.wait_procs(processes, timeout=20)[1]
            assert all(each.status() == "zombie" for each in left), left  # until this machine's init has looked
            try:
                ranks.run(where)
            except (RankFailedError, OSError) as failed:
                found.append(server.pid)
    with LocalRanks(2, threads_per_rank=1) as ranks:
        print(*ranks.run(where), flush=True)
        assert psutil.Process(ranks.pids[0]).ppid() not in found
        print(*ranks.pids, psutil.Process(ranks.pids[0]).ppid(), flush=True)
        os.kill(os.getpid(), 9)
"""


def where(group: EPGroup) -> int:
    return group.rank


def test_ranks_go_with_their_server_the_next_have_another_and_all_go_with_the_program(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == -9, done.stderr
    ranks, pids = done.stdout.splitlines()
    assert ranks == "0 1"
    left = [psutil.Process(int(pid)) for pid in pids.split() if psutil.pid_exists(int(pid))]
    left = psutil.wait_procs(left, timeout=20)[1]
    assert all(each.status() == "zombie" for each in left)
    assert [each.name for each in tmp_path.iterdir()] == [script.name]  # nor is the folder of the server's socket


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before, Python looks for any module in the user's folder first")
def test_a_process_begins_in_a_folder_with_any_modules_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('a script of the user')")
    monkeypatch.chdir(tmp_path)
    process = SPAWN.Process(target=os.getpid)
    before = dict(os.environ)
    with starting():
        process.start()
    process.join(60)
    assert process.exitcode == 0
    assert os.environ == before
    monkeypatch.syspath_prepend(tmp_path)  # which is how a program of this folder runs
    assert unsearched_folder() is None


def test_where_no_server_can_be_had_ranks_are_spawned(tmp_path: Path) -> None:
    """One that ends while it imports: its program has a module of that name that ends the process."""
    script, server = tmp_path / "program.py", tmp_path / "ends_here.py"
    server.write_text("import os\nos._exit(3)\n")
    script.write_text(
        "import os, psutil\nfrom megamoe.launch.forking.server import preload\n"
        "from megamoe.launch.ranks import LocalRanks\nfrom tests.test_forking import where\n"
        "if __name__ == '__main__':\n    preload('ends_here')\n"
        "    with LocalRanks(1, threads_per_rank=1) as ranks:\n"
        "        print(*ranks.run(where), psutil.Process(ranks.pids[0]).ppid() == os.getpid())\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{tmp_path}"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.stdout, done.returncode) == ("0 True\n", 0), done.stderr
    assert "Traceback" not in done.stderr


def test_where_the_servers_socket_has_no_room_for_its_path_ranks_are_spawned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[Path] = []

    def begin() -> None:
        tried.append(tmp_path)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / ("a" * 120)))

    monkeypatch.setattr(server, "_server", server._Server())
    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", begin)
    assert [server.context(forked=True) for _ in range(2)] == [SPAWN, SPAWN]
    assert len(tried) == 1
