"""Ranks on this machine: processes that are started once, run functions on a gloo group, and are always taken down.

A rank that dies is noticed at once and named; so is one that does not answer in time. When the parent goes, however
it goes, its ranks go too.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from megamoe.launch.forking.server import reap
from megamoe.launch.lab.namespaces import Host
from megamoe.launch.process import cause, loopback, portable, share_of_cores, start, uninterrupted
from megamoe.launch.requests import check_main, check_ranks_here
from megamoe.parallel.group import EPGroup, init_group

P = ParamSpec("P")
T = TypeVar("T")
Work = Callable[Concatenate[EPGroup, P], T]


class RankFailedError(RuntimeError):
    """A rank died, did not answer in time, or raised; rank says which."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank, self.message = rank, message

    def __reduce__(self) -> tuple[type[RankFailedError], tuple[int, str]]:
        return type(self), (self.rank, self.message)


class LocalRanks:
    """A context manager with num_ranks processes that wait for work.

    threads_per_rank   torch threads of each; by default the cores that this process may use shared out, at least one
    deadline_s         bound on starting, on every wait of the group, and the default for a run as a whole
    hosts              where each rank lives, the machine's own loopback by default; lab() makes others
    shared_memory      whether ranks of a host share memory, as init_group() has it
    group              what work gets, as a context manager: group(rank, size, store); init_group() by default

        with LocalRanks(4) as ranks:
            outputs = ranks.run(work, 7)     # work(group, 7) on every rank; results in order of rank
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        threads_per_rank: int | None = None,
        deadline_s: float = 60.0,
        hosts: Sequence[Host] | None = None,
        shared_memory: bool = True,
        group: Callable[[int, int, Store], AbstractContextManager[Any]] | None = None,
    ) -> None:
        check_main()
        check_ranks_here("num_ranks", num_ranks)
        self._hosts = list(hosts) if hosts is not None else [loopback()] * num_ranks
        if len(self._hosts) != num_ranks:
            raise ValueError(f"{num_ranks} ranks cannot live on {len(self._hosts)} hosts, one each is needed")
        self.num_ranks, self.deadline_s, self.shared_memory = num_ranks, deadline_s, shared_memory
        self._group = group or partial(_group, deadline_s=deadline_s, shared_memory=shared_memory)
        self.threads_per_rank = threads_per_rank or share_of_cores(num_ranks)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._num_runs = 0

    def __enter__(self) -> LocalRanks:
        try:
            for rank, host in enumerate(self._hosts):
                args = (rank, host.address, self.threads_per_rank, self.deadline_s, self._group)
                environment = {"GLOO_SOCKET_IFNAME": host.interface}
                child = start(f"megamoe rank {rank}", _serve, *args, host=host, environment=environment, forked=True)
                self._processes.append(child.process)
                self._pipes.append(child.pipe)
            self._introduce()
        except BaseException:
            self.stop()
            raise
        return self

    def _introduce(self) -> None:
        """Rank 0 opens the store where ranks meet, in its own network, and says its port; the others are told."""
        if not self._pipes[0].poll(self.deadline_s):
            raise RankFailedError(0, f"rank 0 did not start within {self.deadline_s:g} s")
        try:
            port = pickle.loads(self._pipes[0].recv_bytes())
        except EOFError as lost:
            raise self._dead(0) from lost
        for pipe in self._pipes[1:]:
            pipe.send_bytes(pickle.dumps((self._hosts[0].address, port)))

    def _dead(self, rank: int) -> RankFailedError:
        process = self._processes[rank]
        reap(process)
        return RankFailedError(rank, f"rank {rank} (process {process.pid}) died: {cause(process.exitcode)}")

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all ranks and returns when they are gone. A second Ctrl-C does not cut this short."""
        with uninterrupted():
            for process in self._processes:
                process.kill()
            for process in self._processes:
                reap(process)
                process.close()
            for pipe in self._pipes:
                pipe.close()
            self._processes, self._pipes = [], []

    @property
    def pids(self) -> list[int]:
        """Process ids, in order of rank."""
        return [process.pid or 0 for process in self._processes]

    def run(self, work: Work[P, T], *args: Any, size: int | None = None, timeout_s: float | None = None) -> list[T]:
        """work(group, *args) on the first `size` ranks, all by default; their results in order of rank.

        Raises what the first rank that raised has raised, with the rank in a note; RankFailedError where a rank died or
        the run took longer than timeout_s. The ranks are then stopped.
        """
        outcomes = self.outcomes(work, *args, size=size, timeout_s=timeout_s)
        results: list[T] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            results.append(outcome)
        return results

    def outcomes(
        self, work: Work[P, T], *args: Any, size: int | None = None, timeout_s: float | None = None
    ) -> list[T | Exception]:
        """As run(), but an exception of a rank is its outcome, and only a dead or late rank raises."""
        size = self.num_ranks if size is None else size
        if not 1 <= size <= self.num_ranks:
            raise ValueError(f"size must be in [1, {self.num_ranks}], got {size}")
        assert self._processes, "the ranks have been stopped"
        self._num_runs += 1
        for pipe in self._pipes[:size]:
            pipe.send_bytes(pickle.dumps((work, args, size, f"run{self._num_runs}")))
        outcomes: dict[int, T | Exception] = {}
        until = time.monotonic() + (timeout_s or self.deadline_s)
        try:
            while len(outcomes) < size:
                self._collect(outcomes, [rank for rank in range(size) if rank not in outcomes], until)
        except BaseException:
            self.stop()
            raise
        return [outcomes[rank] for rank in range(size)]

    def _collect(self, outcomes: dict[int, Any], missing: list[int], until: float) -> None:
        pipes = {self._pipes[rank]: rank for rank in missing}
        ready = wait(list(pipes), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            raise RankFailedError(missing[0], f"{_ranks(missing)} did not finish within the deadline")
        for pipe in ready:
            rank = pipes[pipe]  # type: ignore[index]
            try:
                outcomes[rank] = pickle.loads(self._pipes[rank].recv_bytes())
            except (EOFError, ConnectionError) as lost:
                raise self._dead(rank) from lost


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _group(rank: int, size: int, store: Store, **how: Any) -> AbstractContextManager[EPGroup]:
    return init_group("cpu", rank=rank, size=size, store=store, **how)


def _serve(
    pipe: Connection, rank: int, address: str, threads: int, deadline_s: float, group: Callable[..., Any]
) -> None:
    """Life of a rank: runs what comes through the pipe, one piece of work at a time, each in a group of its own."""
    torch.set_num_threads(threads)
    timeout = timedelta(seconds=deadline_s)
    if rank == 0:
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        pipe.send_bytes(pickle.dumps(store.port))
    else:
        address, port = pickle.loads(pipe.recv_bytes())
        store = TCPStore(address, port, is_master=False, timeout=timeout)
    while True:
        try:
            work, args, size, prefix = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            with group(rank, size, PrefixStore(prefix, store)) as joined:
                outcome = pickle.dumps(work(joined, *args))
        except Exception as error:  # noqa: BLE001  handed to the parent, which raises it
            outcome = pickle.dumps(portable(error, f"rank {rank}", partial(RankFailedError, rank)))
        pipe.send_bytes(outcome)
