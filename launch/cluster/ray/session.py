"""A connection to Ray: to a cluster that is there, or to one that is started here and stopped with all that it made."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil
import ray

from megamoe.catalog.wording import plural
from megamoe.launch.cluster.ray.private import logs_on_stderr, of_own_cluster
from megamoe.launch.process import loopback
from megamoe.launch.requests import check_ranks_here
from megamoe.schedule.limits import cores

_log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 * 2**20  # results of a call are all that goes through it; what does not fit goes to disk
STOP_S = 10.0
_PREFIX, _HELD = "megamoe-ray-", "driver"  # of a cluster's directory; the file there that its driver has locked


class OwnPlace:
    """The directory of a cluster that is started here, removed with it, or by the next driver where this one is killed.

    Its driver holds a lock on a file in it, which the kernel lets go of whatever ends the process.
    """

    def __init__(self) -> None:
        # the paths of Ray's sockets begin with it and must not exceed 107 bytes, on a Mac 103, which its temporary
        # directory does
        root = Path("/tmp") if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())
        sweep(root)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        try:
            self._held = (self.path / f".{_HELD}").open("wb")
            _lock(self._held)
            (self.path / f".{_HELD}").rename(self.path / _HELD)  # so that none is there that is not locked
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def remove(self) -> None:
        """Ends what still runs there, and removes it. A file that a process writes meanwhile does not keep it."""
        until = time.monotonic() + STOP_S
        while self.path.exists():
            left = processes_of(self.path)
            for process in left:
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    process.kill()
            psutil.wait_procs(left, timeout=STOP_S)
            shutil.rmtree(self.path, ignore_errors=True)
            if self.path.exists():
                if time.monotonic() > until:
                    _log.warning("%s cannot be removed", self.path)
                    break
                time.sleep(0.05)
        self._held.close()


def _lock(file: BinaryIO) -> None:
    """Locks an open file until it is closed. OSError where another process has."""
    if sys.platform == "win32":
        raise AssertionError("check_system() comes first")
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sweep(root: Path) -> None:
    """Removes directories of this user's clusters whose driver was killed, and of which no process is left."""
    if sys.platform == "win32":
        raise AssertionError("check_system() comes first")
    for each in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it has a driver, or has gone meanwhile
            if each.stat().st_uid == os.geteuid():
                with (each / _HELD).open("rb+") as held:
                    _lock(held)
                    if not processes_of(each):
                        shutil.rmtree(each, ignore_errors=True)


class RaySession:
    """This process as Ray's driver. close() ends the connection, and the cluster where it was started here.

    place    directory of the cluster that was started here, None of another's
    """

    def __init__(self, own: OwnPlace | None, *, connected_here: bool) -> None:
        self.place = own.path if own else None
        self._own = own
        self._ends = ExitStack()
        if connected_here:
            self._ends.enter_context(logs_on_stderr())
            self._ends.callback(self._stop)

    def close(self) -> None:
        """Returns when all that was started here is gone: processes, and the directory with what they wrote."""
        self._ends.close()

    def _stop(self) -> None:
        started = processes_of(self.place) if self.place else []
        try:
            ray.shutdown()
            psutil.wait_procs(started, timeout=STOP_S)
        finally:
            if self._own:
                self._own.remove()


def connect(address: str | None, num_workers: int, deadline_s: float) -> RaySession:
    """Joins the cluster at an address (host:port, or ray://host:port), or starts one that lasts as long as the session.

    None and "auto" join the cluster that RAY_ADDRESS names or that `ray start` started on this machine, and start one
    where there is none; "local" starts one in any case. A process that is connected already stays so, and cannot be
    to two. RuntimeError, with the reason, where the cluster does not answer within deadline_s or does not let us in.

    A cluster that is started here ends with the thread that started it, as the kernel sees to.
    """
    if ray.is_initialized():
        return _join_as_connected(address)
    named = os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    if named == "local" or (not named and not _cluster_here()):
        return _start(num_workers)
    if named:
        check_cluster(named, deadline_s)
    session = RaySession(None, connected_here=True)
    try:
        with _in_one_piece():
            ray.init(named, logging_level=logging.ERROR, log_to_driver=True)
    except BaseException as refusal:
        session.close()
        if isinstance(refusal, (ConnectionError, ImportError, RuntimeError)):
            where = named or "this machine"
            raise RuntimeError(f"cannot join the Ray cluster at {where}: {refusal}") from refusal
        raise
    return session


def _join_as_connected(address: str | None) -> RaySession:
    here = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", here):
        raise RuntimeError(f"this process is connected to the Ray cluster at {here} and cannot use {address} besides")
    return RaySession(None, connected_here=False)


def _start(num_workers: int) -> RaySession:
    """A cluster of this machine alone. It has as many CPUs as workers are wanted, whatever the machine has."""
    check_ranks_here("num_workers", num_workers)
    loopback()
    if num_workers > cores():
        _log.warning("%s share %s: they take turns", plural(num_workers, "rank"), plural(cores(), "core"))
    session: RaySession | None = None
    try:
        with _in_one_piece():
            own = OwnPlace()
            session = RaySession(own, connected_here=True)
            ray.init(
                "local",
                num_cpus=num_workers,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level=logging.ERROR,  # of Ray's own notes; without, it warns that tokens are on, as they should
                log_to_driver=True,
                **of_own_cluster(own.path),
            )
    except BaseException as refusal:
        if session is not None:
            session.close()
        if isinstance(refusal, Exception):  # of any type: a machine that is too busy gives a bare Exception
            raise RuntimeError(f"Ray does not start on this machine: {refusal}") from refusal
        raise
    return session


def _cluster_here() -> bool:
    """Whether a cluster that `ray start` started runs on this machine: Ray notes its address, and forgets to erase."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if not note.exists():
        return False
    host, _, port = note.read_text(encoding="utf-8").strip().rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except (OSError, ValueError):
        return False
    return True


def check_cluster(address: str, deadline_s: float) -> None:
    """RuntimeError, with the reason, where no Ray cluster answers at an address.

    Asked in a process that can be ended: ray.init() tries for minutes, and heeds no deadline and no signal.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address {address!r} is not host:port, ray://host:port, auto or local")
    try:
        socket.create_connection((host, int(port)), timeout=deadline_s).close()
    except OSError as refusal:
        reason = refusal.strerror or str(refusal)
        raise RuntimeError(f"no Ray cluster answers at {address}: {reason}. {_HINT}") from refusal
    if "://" in address:
        return
    # away from the user's folder, whose modules would come before Python's own
    line = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        asked = subprocess.run(line, capture_output=True, text=True, timeout=deadline_s, check=False, cwd=os.sep)
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(
            f"what listens at {address} did not answer as a Ray cluster within {deadline_s:g} s. {_HINT}"
        ) from late
    if asked.returncode:
        told = (asked.stderr or asked.stdout).strip().splitlines() or ["no reason given"]
        raise RuntimeError(f"the Ray cluster at {address} does not let us in: {told[-1]}")


_HINT = "The address is the one that `ray start --head` prints, with its port, 6379 by default"


def processes_of(place: Path) -> list[psutil.Process]:
    """What runs of the cluster in a directory, also where its parent has ended, and what that has started."""
    found: dict[int, psutil.Process] = {}
    programs = str(Path(ray.__file__).parent)  # of Ray's own: somebody may look at a file there
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            line = " ".join(process.cmdline())
            if process.pid != os.getpid() and str(place) in line and programs in line:
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    return list(found.values())


@contextmanager
def _in_one_piece() -> Iterator[None]:
    """Signals wait for the end of the block: ray.shutdown() overlooks what an interrupted ray.init() had made.

    Where that was the connection's own threads, Ray crashes this process when it ends. ray.init() also replaces this
    program's answer to SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if sys.platform == "win32":
        raise AssertionError("check_system() comes first")
    came: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler or signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])
