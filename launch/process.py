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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from megamoe.launch.forking.server import FORK_SERVER, QUIET, context, forked_by, own_streams, starting
from megamoe.launch.lab.namespaces import Host
from megamoe.schedule.limits import cores

_LOOPBACK_S = 5.0
LOOPBACK_UP = "sudo ifconfig lo0 up" if sys.platform == "darwin" else "ip link set lo up"


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
    forked: bool = False,
) -> Child:
    """Starts a process that moves to its host, sets its environment, and then lives: life(pipe, *args).

    It ends when this process does, however that ends, and leaves Ctrl-C to it. A spawned process sets its environment
    before it imports torch, where the main module does not.

    forked   it may come from Python's fork server, which has imported torch already: a few milliseconds instead of
             seconds. It is spawned all the same where what it would inherit is not what the server began with.
    """
    if sys.platform == "win32":
        raise AssertionError("check_system() comes first")
    way = context(forked)
    whole = {**QUIET, **os.environ, **environment}
    here, there = way.Pipe()
    shown, prints = way.Pipe(duplex=False) if output else (None, None)
    streams = [prints] if prints is not None else own_streams() if way is FORK_SERVER else []
    process = way.Process(target=_begin, args=(there, streams, host, whole), name=name, daemon=True)
    try:
        with starting():
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
        for end in (there, *streams):
            end.close()
    return Child(process, here, shown)


def _begin(pipe: Connection, streams: list[Connection], host: Host, environment: dict[str, str]) -> None:
    """First steps of the process. Nothing here brings torch, so that all it may say is said where it should be.

    streams   where it prints: both the same way, stdout and stderr, or none, where it has both already
    """
    for number, prints in enumerate(streams * 2 if len(streams) == 1 else streams, 1):
        os.dup2(prints.fileno(), number)
        stream = (sys.stdout, sys.stderr)[number - 1]
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # what was printed is out, whatever comes next
    for prints in streams:
        prints.close()
    if sys.platform == "win32":
        raise AssertionError("check_system() comes first")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which takes this process down
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # it is killed in the end, and may start no process; locks of this method have no name that would be left behind
    mp.set_start_method("fork", force=True)
    threading.Thread(target=_follow_parent, daemon=True).start()
    host.enter()
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # not what the server's other processes draw; Python sees to its own
    gc.disable()  # imports leave no garbage, and torch's many objects would be looked through again and again
    life, args = pickle.loads(pipe.recv_bytes())
    gc.freeze()  # they stay, and no collection looks at them any more
    gc.enable()
    life(pipe, *args)


def _follow_parent() -> None:
    """Ends this process when the one that started it does, or the server that forked it and says how it ended."""
    parent = mp.parent_process()
    assert parent is not None
    ends: list[Any] = [parent.sentinel]
    server = forked_by()
    if server is not None and sys.platform == "linux":
        with suppress(OSError):  # a kernel older than 5.3, or a server that is gone already
            ends.append(os.pidfd_open(server))
        if os.getppid() != server:
            os._exit(1)
    wait(ends)
    os._exit(1)


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
    """Threads for each of so many processes: the cores that this one may use shared out, at least one."""
    return max(1, cores() // num_processes)


def loopback() -> Host:
    """This machine's own loopback, whose interface is lo on Linux and lo0 on macOS.

    RuntimeError where nothing passes over it: ranks would try to meet until their deadlines.
    """
    refusal = loopback_refusal()
    if refusal:
        raise RuntimeError(
            f"ranks of this machine meet over its loopback interface, which takes nothing: {refusal}; {LOOPBACK_UP}"
        )
    name = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    return Host(None, "127.0.0.1", name)


def loopback_refusal() -> str:
    """Why 127.0.0.1 cannot be reached, "" where it can."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_S).close()
    except OSError as refusal:
        return str(refusal.strerror or refusal)
    return ""


def age_s() -> float:
    """Seconds since this process was started."""
    stat = Path("/proc/self/stat")
    if sys.platform != "linux" or not stat.exists():
        return time.time() - float(psutil.Process().create_time())
    _, _, fields = stat.read_bytes().rpartition(b")")
    ticks = fields.split()[19]  # psutil's answer is off by the part of a second of boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
