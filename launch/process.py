"""Processes that this one starts: how they begin, follow their parent and send what they raise, and how they ended."""

from __future__ import annotations

import gc
import io
import multiprocessing as mp
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from megamoe.launch.lab.namespaces import Host

_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
_STARTING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Child:
    """A process that was started, and this end of what it is spoken to through.

    pipe     what its life reads and writes
    output   what it prints, to stdout and stderr alike; None where it prints where this process does
    """

    process: BaseProcess
    pipe: Connection
    output: Connection | None = None

    def close(self) -> None:
        """Closes this end."""
        self.pipe.close()
        if self.output is not None:
            self.output.close()


def start(
    name: str,
    life: Callable[..., None],
    *args: Any,
    host: Host,
    environment: Mapping[str, str],
    output: bool = False,
) -> Child:
    """Spawns a process that moves to its host, sets its environment, and then lives: life(pipe, *args).

    It ends when this process does, however that ends, and leaves Ctrl-C to it. Its environment is set before it
    imports torch, where the main module does not.
    """
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    shown, prints = context.Pipe(duplex=False) if output else (None, None)
    process = context.Process(target=_begin, args=(there, prints, host, dict(environment)), name=name, daemon=True)
    try:
        with _quiet_torch(), _blocked_interrupts():
            process.start()
        here.send_bytes(pickle.dumps((life, args)))
    except BaseException:
        if process.pid is not None:
            process.kill()
        here.close()
        if shown is not None:
            shown.close()
        raise
    finally:
        there.close()
        if prints is not None:
            prints.close()
    return Child(process, here, shown)


def _begin(pipe: Connection, prints: Connection | None, host: Host, environment: dict[str, str]) -> None:
    """First steps of the process. Nothing here brings torch, so that all it may say is said where it should be."""
    if prints is not None:
        for number, stream in enumerate((sys.stdout, sys.stderr), 1):
            os.dup2(prints.fileno(), number)
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)  # what was printed is out, whatever comes next
        prints.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which takes this process down
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_follow_parent, daemon=True).start()
    host.enter()
    os.environ.update(environment)
    gc.disable()  # imports leave no garbage, and torch's many objects would be looked through again and again
    life, args = pickle.loads(pipe.recv_bytes())
    gc.freeze()  # they stay, and no collection looks at them any more
    gc.enable()
    life(pipe, *args)


def _follow_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Read when a process imports torch: no warnings of addresses that have no name."""
    with _STARTING:  # two starts at once would take each other's setting for the program's own
        before = os.environ.get(_LOG_LEVEL)
        os.environ[_LOG_LEVEL] = before or "ERROR"
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(_LOG_LEVEL, None)


@contextmanager
def _blocked_interrupts() -> Iterator[None]:
    """A process that is started here is deaf to Ctrl-C from its first moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C does not cut the block short."""
    before = signal.getsignal(signal.SIGINT)
    # one that is not Python's could not be put back
    ours = before is not None and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def portable(error: Exception, where: str, in_words: Callable[[str], Exception] = RuntimeError) -> Exception:
    """The error as it can be sent: its traceback kept as a note, for a traceback itself does not pickle.

    An exception that does not survive the trip goes as in_words(that note).
    """
    note = f"raised on {where}:\n{''.join(traceback.format_exception(error)).rstrip()}"
    error.__cause__ = error.__context__ = None
    if hasattr(error, "add_note"):
        error.add_note(note)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever its class does when it is pickled
        return in_words(note)
    return error


def cause(exit_code: int | None) -> str:
    """How a process ended.    -9 -> "killed by SIGKILL"    3 -> "exit code 3" """
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def share_of_cores(num_processes: int) -> int:
    """Threads for each of so many processes: the machine's cores shared out, at least one."""
    return max(1, (os.cpu_count() or 1) // num_processes)


def loopback() -> Host:
    """This machine's own loopback, whose interface is lo on Linux and lo0 on macOS."""
    name = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    return Host(None, "127.0.0.1", name)


def age_s() -> float:
    """Seconds since this process was started."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.time() - float(psutil.Process().create_time())
    ticks = stat.read_text().rpartition(")")[2].split()[19]  # psutil's answer is off by the part of a second of boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
