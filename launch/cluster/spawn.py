"""Workers on this machine: a spawned process each, whose answers, lines and end a thread of this process follows."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from megamoe.launch.cluster.worker import Worker, WorkerInfo, WorkerOptions
from megamoe.launch.cluster.worker_handle import WorkerLostError
from megamoe.launch.devices import DEVICE_TYPES, device_of, device_type
from megamoe.launch.forking.server import reap
from megamoe.launch.lab.namespaces import Host
from megamoe.launch.process import Child, cause, loopback, portable, share_of_cores, start, uninterrupted
from megamoe.launch.requests import IMPORTABLE, check_devices, check_main, check_pool, check_ranks_here, make_folder
from megamoe.parallel.interfaces import choose

_GONE_S = 10.0  # a killed process that is there for longer is stuck in the kernel
_EARLY_END = (  # Python imports the program first, and what that raises goes to this process's own stderr
    "it ended while it imported this program, which its traceback above tells of. What starts ranks must be under "
    "if __name__ == '__main__':"
)
_CHUNK_BYTES = 1 << 16  # as much as a pipe holds: one read empties it


class SpawnHandle:
    """A Worker in a process of this machine. label is what its lines begin with, and may be changed at any time."""

    def __init__(self, number: int, child: Child, log: Path | None, reaping: threading.Lock) -> None:
        self.number, self.host, self.label = number, "", f"rank {number}"
        self.pid = child.process.pid or 0
        self._child, self._reaping = child, reaping
        self._output = WorkerOutput(lambda: self.label, log)
        self._asking = threading.Lock()  # what is asked and what is expected have the same order
        self._questions: SimpleQueue[bytes | None] = SimpleQueue()
        self._expected: deque[Future[Any]] = deque()
        self._lost = ""  # how the process ended
        self._gone = threading.Event()
        self._asker = threading.Thread(target=self._ask, name=f"questions to worker {number}", daemon=True)
        self._asker.start()
        threading.Thread(target=self._follow, name=f"answers of worker {number}", daemon=True).start()

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Worker.method(*args) in its process; never waits for the process, so that one that hangs holds nobody up."""
        question, answer = pickle.dumps((method, args)), Future[Any]()
        answer.set_running_or_notify_cancel()  # from here on it cannot be called off
        with self._asking:
            if self._lost:
                answer.set_exception(WorkerLostError(self.number, self._lost))
            else:
                self._expected.append(answer)
                self._questions.put(question)
        return answer

    @property
    def alive(self) -> bool:
        return not self._lost

    def kill(self) -> None:
        """Ends the process, also one that is stopped, and returns when it is gone and its last line has been shown.

        RuntimeError where it is there still after ten seconds.
        """
        self.strike()
        if not self._gone.wait(_GONE_S):
            raise RuntimeError(f"worker {self.number} (process {self.pid}) was killed and is there still")

    def strike(self) -> None:
        """kill() without waiting."""
        with self._reaping:  # one that has been reaped must not be killed: its id may be another's by now
            if self.alive:
                self._child.process.kill()

    @property
    def said_last(self) -> str:
        """The last line that it printed."""
        return self._output.last_line

    def _ask(self) -> None:
        """Sends what is asked, for as long as the process is there."""
        with suppress(OSError):
            while (question := self._questions.get()) is not None:
                self._child.pipe.send_bytes(question)

    def _follow(self) -> None:
        """Until the process ends and all that it left in its pipes is read: lines are shown, answers are delivered."""
        answers, output, end = self._child.pipe, self._child.output, self._child.process.sentinel
        assert output is not None
        watched: list[Any] = [answers, output, end]
        while (ready := wait(watched)) != [end]:
            # asked of every turn, so that what was printed before an answer is shown before it is delivered
            if output in watched and output.poll() and not self._pass_on(output):
                watched.remove(output)
            if answers in ready and not self._deliver(answers):
                watched.remove(answers)
        self._end()

    def _pass_on(self, output: Connection) -> bool:
        data = os.read(output.fileno(), _CHUNK_BYTES)
        self._output.take(data)
        return bool(data)

    def _deliver(self, answers: Connection) -> bool:
        try:
            answer = answers.recv_bytes()
        except (EOFError, OSError):
            return False
        future = self._expected.popleft()
        try:
            returned, value = pickle.loads(answer)
        except Exception as unknown:  # noqa: BLE001  what is not understood here is an answer all the same
            unreadable = RuntimeError(f"the answer of worker {self.number} cannot be read: {unknown!r}")
            future.set_exception(unreadable)
            return True
        if returned:
            future.set_result(value)
        else:
            future.set_exception(value)
        return True

    def _end(self) -> None:
        """The process has ended: it is reaped, what was left open is closed, and what it was asked fails."""
        process = self._child.process
        with self._reaping, self._asking:
            reap(process, _GONE_S)
            self._lost = f"worker {self.number} (process {self.pid}) died: {cause(process.exitcode)}"
            if process.exitcode is not None:  # unknown where other code of this program has waited for all children
                process.close()
            left = list(self._expected)
        self._output.close()
        self._questions.put(None)
        self._asker.join(_GONE_S)
        self._child.close()
        self._gone.set()
        for future in left:
            future.set_exception(WorkerLostError(self.number, self._lost))


class SpawnPool:
    """Workers in processes of this machine. A context manager, which ends them all.

    device      type of what the workers compute on; worker 2 has the device with that number
    deadline_s  bound on every wait of the workers
    threads     torch threads of each; by default the cores that this process may use shared out, at least one
    hosts       where each worker is, the machine's own loopback by default; lab() makes others
    interface   network interface that the workers use, where no hosts are given
    run         id of the run, see WorkerOptions
    log_dir     folder in which worker-2.log keeps what worker 2 prints; made if it is not there

        with SpawnPool(4) as workers:
            worker = workers.open(2, deadline_s=60)
            worker.call("info").result(10)
    """

    def __init__(
        self,
        num_workers: int,
        *,
        device: str = "cpu",
        deadline_s: float = 60.0,
        threads: int | None = None,
        hosts: Sequence[Host] | None = None,
        interface: str | None = None,
        run: str | None = None,
        log_dir: Path | None = None,
    ) -> None:
        check_main()
        check_ranks_here("num_workers", num_workers)
        check_pool("num_workers", num_workers, deadline_s, threads, run)
        check_devices(device, num_workers)
        if hosts is not None and len(hosts) != num_workers:
            raise ValueError(f"{num_workers} workers cannot be on {len(hosts)} hosts, one each is needed")
        if hosts is not None and interface is not None:
            raise ValueError(f"hosts have their own interfaces, {interface!r} cannot be used with them")
        self._device, self._deadline_s, self._run = device_type(device), deadline_s, run
        self._threads = threads or share_of_cores(num_workers)
        self._hosts = list(hosts) if hosts is not None else [_host(interface)] * num_workers
        self._log_dir = log_dir
        if log_dir is not None:
            make_folder(log_dir)
        self._handles: dict[int, SpawnHandle] = {}
        self._reaping = threading.Lock()  # starting a process reaps others that have ended
        self._closed = False

    def __enter__(self) -> SpawnPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, number: int, deadline_s: float) -> SpawnHandle:
        """Starts a worker and returns when it answers. Whoever had its number before is ended.

        RuntimeError, with the reason, where it ends before it answers or does not answer in time; nothing is left.
        """
        if not 0 <= number < len(self._hosts):
            raise ValueError(f"there are workers 0 to {len(self._hosts) - 1}, no worker {number}")
        if number in self._handles:
            self._handles[number].kill()
        begun = time.monotonic()
        handle = self._start(number)
        try:
            info: WorkerInfo = handle.call("info").result(max(0.0, deadline_s - (time.monotonic() - begun)))
        except WorkerLostError as lost:
            raise RuntimeError(f"{lost.message}: {handle.said_last or _EARLY_END}") from lost
        except TimeoutError as late:
            handle.kill()
            raise RuntimeError(f"worker {number} did not answer within {deadline_s:g} s") from late
        except BaseException:
            handle.kill()
            raise
        handle.host = info.host
        return handle

    def _start(self, number: int) -> SpawnHandle:
        host = self._hosts[number]
        options = WorkerOptions(
            device=device_of(self._device.name, number),
            address=host.address,
            interface=host.interface,
            threads=self._threads,
            deadline_s=self._deadline_s,
            run=self._run,
        )
        # a worker on an accelerator uses gloo too, for what is not on the device
        environment = DEVICE_TYPES["cpu"].interface_setting(host.interface)
        environment |= self._device.interface_setting(host.interface)
        log = None if self._log_dir is None else self._log_dir / f"worker-{number}.log"
        with self._reaping:
            if self._closed:
                raise RuntimeError("the workers have been closed")
            try:
                if log is not None:
                    log.touch()
                name = f"megamoe worker {number}"
                forked = self._device.name == "cpu"  # what drives an accelerator need not outlive a fork
                child = start(
                    name, _answer, number, options, host=host, environment=environment, output=True, forked=forked
                )
            except OSError as refusal:
                raise RuntimeError(f"worker {number} cannot be started: {refusal}") from refusal
            handle = self._handles[number] = SpawnHandle(number, child, log, self._reaping)
        return handle

    def close(self) -> None:
        with self._reaping:
            self._closed = True
            handles = list(self._handles.values())
        with uninterrupted():
            for handle in handles:
                handle.strike()
            for handle in handles:
                handle.kill()


def _host(interface: str | None) -> Host:
    if interface is None:
        return loopback()
    chosen = choose(name=interface)
    return Host(None, chosen.address, chosen.name)


def _answer(pipe: Connection, number: int, options: WorkerOptions) -> None:
    """Life of a worker's process: one question after another, until there is no one who asks."""
    worker = Worker(options)
    while True:
        try:
            question = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answered(worker, number, question))


def _unpacked(number: int, question: bytes) -> tuple[str, tuple[Any, ...]]:
    try:
        method, args = pickle.loads(question)
    except (pickle.UnpicklingError, AttributeError, ImportError) as unknown:
        raise ValueError(f"worker {number} cannot read what it is asked: {unknown}. {IMPORTABLE}") from unknown
    return method, args


def _answered(worker: Worker, number: int, question: bytes) -> bytes:
    try:
        method, args = _unpacked(number, question)
        return pickle.dumps((True, getattr(worker, method)(*args)))
    except Exception as error:  # noqa: BLE001  handed to who asked
        return pickle.dumps((False, portable(error, f"worker {number}")))


class WorkerOutput:
    """Takes what was read of a worker's stdout and stderr and passes whole lines on.

    label   asked before every line: "rank 2" makes "[rank 2] line"
    log     file that everything is appended to as it came, None keeps nothing
    """

    def __init__(self, label: Callable[[], str], log: Path | None) -> None:
        self._label, self._rest, self._shown = label, b"", True
        self._log = None if log is None else log.open("ab", buffering=0)
        self.last_line = ""

    def take(self, data: bytes) -> None:
        if self._log is not None:
            self._log.write(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._show(line)

    def close(self) -> None:
        """Shows the line that was not ended."""
        if self._rest:
            self._show(self._rest)
        self._rest = b""
        if self._log is not None:
            self._log.close()

    def _show(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self.last_line = text.strip() or self.last_line
        try:
            if self._shown:
                sys.stderr.write(f"[{self._label()}] {text}\n")
        except (OSError, ValueError):  # stderr is closed, or nobody reads it any more: the worker goes on
            self._shown = False
