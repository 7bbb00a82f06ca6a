"""Workers on this machine: answers in order, errors as they were raised, an end noticed at once, every line kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megamoe.launch.cluster.spawn import SpawnHandle, SpawnPool
from megamoe.launch.cluster.worker import Rendezvous
from megamoe.launch.cluster.worker_handle import WorkerLostError
from megamoe.launch.lab.namespaces import Host
from megamoe.launch.process import loopback
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from tests.processes import started

QUICK_S = 20.0


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers") / "new" / "logs"


@pytest.fixture(scope="module")
def handles(logs: Path) -> Iterator[SpawnPool]:
    with SpawnPool(3, threads=1, deadline_s=QUICK_S, log_dir=logs) as opened:
        yield opened


class OpenWorkers:
    """The workers that are open, each opened when it is asked for and again where its process has ended."""

    def __init__(self, handles: SpawnPool) -> None:
        self._handles = handles
        self._open: dict[int, SpawnHandle] = {}

    def __getitem__(self, number: int) -> SpawnHandle:
        if number not in self._open or not self._open[number].alive:
            self._open[number] = self._handles.open(number, 60)
        return self._open[number]


@pytest.fixture(scope="module")
def workers(handles: SpawnPool) -> OpenWorkers:
    return OpenWorkers(handles)


def meet(*handles: SpawnHandle, generation: int = 1) -> None:
    """Makes a group of these workers, ranks in their order."""
    address, port = handles[0].call("open_store").result(QUICK_S)
    joined = [
        handle.call("join", Rendezvous(address, port, generation, rank, len(handles)))
        for rank, handle in enumerate(handles)
    ]
    for each in joined:
        each.result(QUICK_S)


def alone(handle: SpawnHandle) -> SpawnHandle:
    """The worker in a group of its own, where it can run() anything."""
    meet(handle)
    return handle


# ---- answers ----


def squared(_: EPGroup, number: int) -> int:
    return number**2


def test_a_worker_says_who_it_is(workers: OpenWorkers) -> None:
    handle = workers[0]
    info = handle.call("info").result(QUICK_S)
    assert (info.host, info.pid, info.device) == (handle.host, handle.pid, "cpu")
    assert psutil.Process(handle.pid) in started()
    assert handle.alive


def test_answers_come_in_the_order_of_the_calls(workers: OpenWorkers) -> None:
    handle = alone(workers[0])
    order: list[int] = []
    answers = [handle.call("run", squared, number) for number in range(50)]
    for number, answer in enumerate(answers):
        answer.add_done_callback(lambda _, number=number: order.append(number))  # type: ignore[misc]
    assert [answer.result(QUICK_S) for answer in answers] == [number**2 for number in range(50)]
    assert order == sorted(order)


def summed(group: EPGroup, start: int) -> tuple[int, float, str, int]:
    total = torch.tensor([float(group.rank + start)])
    dist.all_reduce(total)
    return group.rank, total.item(), os.environ["GLOO_SOCKET_IFNAME"], torch.get_num_threads()


def test_workers_meet_and_meet_again_in_another_order(workers: OpenWorkers) -> None:
    for generation, order in enumerate([(0, 1, 2), (2, 0), (1, 2, 0)], 1):
        members = [workers[number] for number in order]
        meet(*members, generation=generation)
        found = [answer.result(QUICK_S) for answer in [handle.call("run", summed, 10) for handle in members]]
        expected = 10.0 * len(order) + sum(range(len(order)))
        assert found == [(rank, expected, loopback().interface, 1) for rank in range(len(order))]


def raises(_: EPGroup, kind: str) -> None:
    class LocalError(Exception):
        """Cannot be pickled: it is known inside this function only."""

    errors: dict[str, Exception] = {
        "value": ValueError("too many"),
        "peer": PeerError(3, "there", "combine", "layers.0", 2, 1.5, 60.0, "connection closed"),
        "local": LocalError("nobody knows me"),
    }
    raise errors[kind]


def test_an_exception_keeps_its_type_and_the_worker_goes_on(workers: OpenWorkers) -> None:
    handle = alone(workers[0])
    failed = handle.call("run", raises, "value").exception(QUICK_S)
    assert isinstance(failed, ValueError)
    assert str(failed) == "too many"
    assert any("raised on worker 0" in note and "in raises" in note for note in getattr(failed, "__notes__", ()))
    lost = handle.call("run", raises, "peer").exception(QUICK_S)
    assert isinstance(lost, PeerError)
    assert (lost.rank, lost.phase, lost.wave) == (3, "combine", 2)
    unknown = handle.call("run", raises, "local").exception(QUICK_S)
    assert isinstance(unknown, RuntimeError)
    assert "nobody knows me" in str(unknown)
    assert handle.call("run", squared, 3).result(QUICK_S) == 9


def returns_a_lock(_: EPGroup) -> object:
    return threading.Lock()


class ReadableThere:
    """Can be unpickled in the process that made it alone."""

    def __reduce__(self) -> tuple[object, ...]:
        return read_in, (os.getpid(),)


def read_in(process: int) -> None:
    if process != os.getpid():
        raise ImportError("no module has it here")


def returns_what_is_readable_there(_: EPGroup) -> object:
    return ReadableThere()


def test_what_cannot_be_sent_or_read_is_said_and_the_worker_goes_on(workers: OpenWorkers) -> None:
    handle = alone(workers[0])
    with pytest.raises(TypeError, match="cannot pickle"):
        handle.call("run", squared, threading.Lock())
    assert isinstance(handle.call("run", returns_a_lock).exception(QUICK_S), TypeError)
    assert isinstance(handle.call("no_such_method").exception(QUICK_S), AttributeError)
    unreadable = handle.call("run", returns_what_is_readable_there).exception(QUICK_S)
    assert str(unreadable) == "the answer of worker 0 cannot be read: ImportError('no module has it here')"
    assert handle.call("run", squared, 3).result(QUICK_S) == 9


def echoed(_: EPGroup, data: bytes) -> bytes:
    return data


def test_large_questions_and_answers_pass_and_no_call_waits_for_the_worker(workers: OpenWorkers) -> None:
    handle = alone(workers[0])
    data = os.urandom(8_000_000)
    os.kill(handle.pid, signal.SIGSTOP)
    begun = time.monotonic()
    answers = [handle.call("run", echoed, data) for _ in range(3)]
    assert time.monotonic() - begun < 2, "a call waited for a worker that had stopped"
    os.kill(handle.pid, signal.SIGCONT)
    assert all(answer.result(QUICK_S) == data for answer in answers)


# ---- ends ----


def hangs(_: EPGroup) -> None:
    threading.Event().wait(60)


def ends(_: EPGroup, code: int) -> None:
    os._exit(code)


@pytest.mark.parametrize("how", ["killed", "exits"])
def test_all_that_a_worker_was_asked_fails_when_it_dies_and_it_can_be_opened_again(
    handles: SpawnPool, workers: OpenWorkers, how: str
) -> None:
    handle = alone(workers[1])
    waiting = [handle.call("run", hangs) if how == "killed" else handle.call("run", ends, 7), handle.call("info")]
    begun = time.monotonic()
    if how == "killed":
        os.kill(handle.pid, signal.SIGKILL)
    said = f"worker 1 (process {handle.pid}) died: {'killed by SIGKILL' if how == 'killed' else 'exit code 7'}"
    for answer in waiting:
        lost = answer.exception(QUICK_S)
        assert isinstance(lost, WorkerLostError)
        assert (lost.number, str(lost)) == (1, said)
    assert time.monotonic() - begun < 3
    assert not handle.alive
    with pytest.raises(WorkerLostError, match="worker 1"):
        handle.call("info").result(0)
    handle.kill()  # of one that is gone
    again = handles.open(1, 60)
    assert again.pid != handle.pid
    assert again.call("info").result(QUICK_S).pid == again.pid


def test_a_worker_that_is_stopped_can_be_killed(workers: OpenWorkers) -> None:
    handle = workers[1]
    os.kill(handle.pid, signal.SIGSTOP)
    waiting = handle.call("info")
    begun = time.monotonic()
    handle.kill()
    assert time.monotonic() - begun < 3
    assert not psutil.pid_exists(handle.pid)
    assert isinstance(waiting.exception(QUICK_S), WorkerLostError)


def test_what_waits_for_an_answer_may_kill_the_worker(workers: OpenWorkers) -> None:
    handle, done = alone(workers[1]), threading.Event()

    def kill(_: object) -> None:
        handle.kill()
        done.set()

    handle.call("run", ends, 3).add_done_callback(kill)
    assert done.wait(5)


def test_the_process_of_a_worker_ends_when_the_worker_is_opened_again(handles: SpawnPool, workers: OpenWorkers) -> None:
    handle = workers[1]
    again = handles.open(1, 60)
    assert not handle.alive
    assert not psutil.pid_exists(handle.pid)
    assert again.alive


def test_a_worker_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    before = started()
    descriptors = psutil.Process().num_fds()
    with SpawnPool(1, hosts=[Host("megamoe-not-there-r0", "10.77.0.1", "link0")], log_dir=tmp_path) as opened:
        with pytest.raises(RuntimeError, match=r"worker 0 \(process \d+\) died: exit code 1: .*megamoe-not-there-r0"):
            opened.open(0, 60)
        assert started() <= before
        assert "No such file or directory" in (tmp_path / "worker-0.log").read_text()
    assert psutil.Process().num_fds() <= descriptors


def test_a_worker_that_does_not_answer_in_time_is_ended() -> None:
    before = started()
    with SpawnPool(1) as opened:
        with pytest.raises(RuntimeError, match=r"worker 0 did not answer within 0.01 s"):
            opened.open(0, 0.01)
        assert started() <= before


def test_workers_of_a_closed_pool_are_gone_and_stay_so() -> None:
    with SpawnPool(2, threads=1) as opened:
        pids = [opened.open(number, 60).pid for number in range(2)]
        os.kill(pids[1], signal.SIGSTOP)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="have been closed"):
        opened.open(0, 60)
    opened.close()


ORPHANS = """
import os, signal, sys
from megamoe.launch.cluster.spawn import SpawnPool
if __name__ == "__main__":
    with SpawnPool(2, threads=1) as workers:
        print(*[workers.open(number, 60).pid for number in range(2)], flush=True)
        signal.pause()
"""


def test_workers_go_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(pids, timeout=20)
    assert not alive


UNGUARDED = """
from megamoe.launch.cluster.spawn import SpawnPool
with SpawnPool(1, threads=1) as workers:
    print(workers.open(0, 60).pid)
"""
GUARDED = UNGUARDED.replace("\nwith", "\nif __name__ == '__main__':\n  with").replace("    print", "      print")


def program(place: Path, how: str) -> subprocess.CompletedProcess[str]:
    """Runs one that opens a worker."""
    script = place / f"{how}.py"
    before = "import os\nos.unlink(__file__)\n" if how == "gone" else ""
    script.write_text(UNGUARDED if how == "unguarded" else before + GUARDED)
    command = {"stdin": ["-"], "command": ["-c", GUARDED]}.get(how, [str(script)])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, *command]
    return subprocess.run(line, input=GUARDED, env=environment, capture_output=True, text=True, timeout=60, check=False)


PROGRAMS = ["stdin", "command", "unguarded", "gone"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All of them, run two at a time."""
    place = tmp_path_factory.mktemp("programs")
    with ThreadPoolExecutor(2) as pool:
        yield {how: pool.submit(program, place, how) for how in PROGRAMS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("how", PROGRAMS)
def test_a_program_that_ranks_cannot_import_is_told_what_to_do(
    programs: dict[str, Future[subprocess.CompletedProcess[str]]], how: str
) -> None:
    done = programs[how].result()
    if how == "command":
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    if how == "unguarded":
        assert "put what starts them under if __name__ == '__main__':" in done.stderr
        assert "died: exit code 1: it ended while it imported this program" in last
        assert "What starts ranks must be under if __name__ == '__main__':" in last
    else:
        assert last.startswith("ValueError: ranks are spawned, and each begins by importing the program's file, but ")
        assert "save the program as a file and run that" in last


# ---- what they print ----


def prints(_: EPGroup, num_lines: int, *, then_dies: bool = False) -> None:
    for number in range(num_lines):
        print(f"line {number}", file=(sys.stdout, sys.stderr)[number % 2])
    os.write(1, "not ended, 专家".encode())
    if then_dies:
        os.kill(os.getpid(), signal.SIGKILL)
    os.write(1, b"\n")


def prints_and_dies(group: EPGroup, num_lines: int) -> None:
    prints(group, num_lines, then_dies=True)


def test_lines_go_to_stderr_with_the_workers_name_and_to_its_log(
    workers: OpenWorkers, logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handle = alone(workers[2])
    handle.call("run", prints, 2).result(QUICK_S)
    handle.label = "rank 7"
    handle.call("run", prints, 1).result(QUICK_S)
    handle.kill()
    shown = capfd.readouterr()
    assert shown.out == ""
    ours = [line for line in shown.err.splitlines() if re.search(r"line \d|not ended", line)]
    expected = ["[rank 2] line 0", "[rank 2] line 1", "[rank 2] not ended, 专家"]
    assert ours == [*expected, "[rank 7] line 0", "[rank 7] not ended, 专家"]
    kept = (logs / "worker-2.log").read_text()
    assert kept.endswith("line 0\nline 1\nnot ended, 专家\nline 0\nnot ended, 专家\n")


def test_what_was_printed_before_a_kill_is_shown_and_kept_to_the_last_letter(
    workers: OpenWorkers, logs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handle = alone(workers[2])
    lost = handle.call("run", prints_and_dies, 20_000).exception(QUICK_S)
    assert isinstance(lost, WorkerLostError)
    ours = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[rank 2] ")]
    assert ours[-20_001:-1] == [f"[rank 2] line {number}" for number in range(20_000)]
    assert ours[-1] == "[rank 2] not ended, 专家"
    kept = (logs / "worker-2.log").read_text()
    assert kept.endswith("line 19998\nline 19999\nnot ended, 专家")


# ---- wrong requests ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_workers": 0}, "num_workers must be positive, got 0"),
        ({"num_workers": 2, "deadline_s": -1.0}, "deadline_s must be positive and finite, got -1.0"),
        ({"num_workers": 2, "device": "abacus"}, "device type 'abacus' is not one of"),
        ({"num_workers": 2, "hosts": [loopback()]}, "2 workers cannot be on 1 hosts"),
        ({"num_workers": 1, "interface": "nothing0"}, "no interface called 'nothing0'"),
        ({"num_workers": 1, "hosts": [loopback()], "interface": "lo"}, "hosts have their own interfaces"),
    ],
)
def test_a_wrong_request_is_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SpawnPool(**arguments)  # type: ignore[arg-type]


def test_there_are_as_many_workers_as_were_asked_for(handles: SpawnPool) -> None:
    with pytest.raises(ValueError, match="there are workers 0 to 2, no worker 3"):
        handles.open(3, 60)
