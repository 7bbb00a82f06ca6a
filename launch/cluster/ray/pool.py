"""Workers on Ray: each an actor in a bundle of its own, on one machine or on as many as the cluster has.

Ray is an extra. Of these files only this one can be imported without it; the others are once workers are asked for.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.launch.devices import device_type
from megamoe.launch.forking.surroundings import unsearched_folder
from megamoe.launch.process import uninterrupted
from megamoe.launch.requests import check_pool, check_system

if TYPE_CHECKING:
    from megamoe.launch.cluster.ray.handle import RayHandle
    from megamoe.launch.cluster.ray.placement import Placement

_log = logging.getLogger(__name__)

# Read by Ray, the first when it is imported: without them it merges lines that look alike, and colours prefixes
_PLAIN_OUTPUT = {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0"}
_MARK = re.compile(r":(job_id|actor_name|task_name):")  # begins a line that Ray writes into a log for itself


@dataclass(frozen=True, slots=True)
class RankLog:
    """A file with what a worker's process wrote: its path on its node. A reopened worker has one a process."""

    number: int
    node: str
    pid: int
    path: str


class RayPool:
    """num_workers places for workers on a Ray cluster, one device each; nodes are filled one after the other.

    address      of the cluster: host:port, ray://host:port; None or "auto" for the one on this machine, started where
                 there is none; "local" to start one in any case
    device       device type of every worker
    deadline_s   bound on connecting and on finding room, and on every wait of a worker
    threads      torch threads of each worker; by default its node's cores shared out among the workers there
    run          id of the run, under which `megamoe doctor --run` finds the ranks
    log_dir      where worker-N.log is left for each worker of a cluster that was started here; another cluster keeps
                 its logs itself, where log_paths() says

    What ranks write, to stdout or stderr, goes to the driver's stderr behind "(rank N pid=...)". Connects when first
    used or entered. ValueError where Ray is not installed.

        with RayPool(4, address="10.0.0.1:6379", device="cuda") as workers:
            worker = workers.open(0, deadline_s=60.0)
            info = worker.call("info").result(timeout=60.0)
    """

    def __init__(
        self,
        num_workers: int,
        *,
        address: str | None = None,
        device: str = "cpu",
        deadline_s: float = 60.0,
        threads: int | None = None,
        run: str | None = None,
        log_dir: Path | None = None,
    ) -> None:
        check_pool("num_workers", num_workers, deadline_s, threads, run)
        self._resource = device_type(device).ray_resource
        check_system()
        _require_ray()
        self.num_workers, self.address, self.device, self.deadline_s = num_workers, address, device, deadline_s
        self._threads, self._run, self._log_dir = threads, run, log_dir
        self._placement: Placement | None = None
        self._unsearched: str | None = None
        self._handles: dict[int, RayHandle] = {}
        self._logs: list[RankLog] = []
        self._ends = ExitStack()
        self._opens = threading.Condition()  # of _opening, the calls of open() that are under way, and _closed
        self._opening, self._closed = 0, False

    def __enter__(self) -> RayPool:
        self.place()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def place(self) -> Placement:
        """Connects and sets the bundles apart, where that is not done. RuntimeError, with the reason, on failure."""
        from megamoe.launch.cluster.ray.placement import Placement
        from megamoe.launch.cluster.ray.session import connect

        if self._placement is None:
            self._unsearched = unsearched_folder()
            try:
                session = connect(self.address, self.num_workers, self.deadline_s)
                self._ends.callback(session.close)
                if session.place and self._log_dir:
                    self._ends.callback(self._keep_logs, session.place, self._log_dir)
                elif self._log_dir:
                    _log.warning(
                        "the Ray cluster was not started here, and keeps logs itself: none in %s", self._log_dir
                    )
                placement = Placement(self.num_workers, self._resource)
                self._ends.callback(self._await_opens)
                self._ends.callback(placement.release)
                placement.reserve(self.deadline_s, grows=session.place is None)
                self._ends.callback(self._end_workers)
            except BaseException:
                with uninterrupted():
                    self._ends.close()
                raise
            self._placement = placement
        return self._placement

    def open(self, number: int, deadline_s: float) -> RayHandle:
        """Starts a worker's process and returns when it answers. RuntimeError, with the reason, where there is none.

        Whoever had its number before is ended. A worker whose node is gone moves to one that has room, if there is one,
        as soon as Ray has noticed. Workers can be opened from several threads at once, and none once close() has begun.
        """
        if not 0 <= number < self.num_workers:
            raise ValueError(f"worker {number} is not in [0, {self.num_workers})")
        with self._opens:
            if self._closed:
                raise RuntimeError("the workers have been closed")
            placement = self.place()
            self._opening += 1
        try:
            return self._open(number, placement, deadline_s)
        finally:
            with self._opens:
                self._opening -= 1
                self._opens.notify_all()

    def _open(self, number: int, placement: Placement, deadline_s: float) -> RayHandle:
        from megamoe.launch.cluster.ray.actor import WorkerOrder
        from megamoe.launch.cluster.ray.handle import open_worker

        before = self._handles.pop(number, None)
        if before is not None and before.alive:
            before.kill()
        elif before is not None:  # on a node that is gone this would wait for Ray to say so
            before.abandon()
        beside = placement.num_workers_beside(number)
        order = WorkerOrder(self.device, beside, self._threads, self.deadline_s, self._run, self._unsearched)
        handle, occupant = open_worker(number, placement, order, deadline_s)
        self._handles[number] = handle
        self._logs.append(RankLog(number, occupant.address, handle.pid, occupant.log))
        return handle

    def log_paths(self) -> list[RankLog]:
        """Where what the ranks write is kept, an entry for each process there was, in the order they were opened."""
        return list(self._logs)

    def close(self) -> None:
        """Ends all that was started, and returns when it is gone. Ctrl-C does not cut this short."""
        with self._opens:
            self._closed = True
        with uninterrupted():
            self._placement = None
            self._ends.close()

    def _await_opens(self) -> None:
        """Without bundles they fail; a call to Ray after the connection has ended would start a cluster of its own.

        One that Ray holds for longer than deadline_s is waited for no more.
        """
        with self._opens:
            self._opens.wait_for(lambda: not self._opening, self.deadline_s)

    def _end_workers(self) -> None:
        """All at once: on another node each can take seconds. Raises what the first that could not be ended raised."""
        handles = list(self._handles.values())
        self._handles = {}
        with ThreadPoolExecutor(max_workers=max(1, len(handles))) as pool:
            list(pool.map(lambda handle: handle.kill(), handles))

    def _keep_logs(self, place: Path, directory: Path) -> None:
        """worker-N.log for every worker: what its processes wrote, one after the other, without Ray's marks."""
        directory.mkdir(parents=True, exist_ok=True)
        for number in {log.number for log in self._logs}:
            with open(directory / f"worker-{number}.log", "w", encoding="utf-8") as kept:
                for pid in [log.pid for log in self._logs if log.number == number]:
                    for path in place.glob(f"session_latest/logs/worker-*-{pid}.err"):
                        with open(path, encoding="utf-8", errors="replace") as written:
                            kept.writelines(line for line in written if not _MARK.match(line))


def _require_ray() -> None:
    """ValueError where Ray is not installed. Has it write plainly, where the user has not said how."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("workers on Ray need it installed: pip install 'megamoe[ray]'")
    for name, value in _PLAIN_OUTPUT.items():
        os.environ.setdefault(name, value)
