"""Ranks in threads, in processes and through a group of one rank, which check a GPU's exchange: never stuck."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.interpreter import interpreted

pytest.importorskip("triton")

from benchmarks.gpu_kernels.findings import Check
from benchmarks.gpu_kernels.plan import Task
from benchmarks.gpu_kernels.stages import one_rank, processes, ranks
from benchmarks.gpu_kernels.stages.processes import ProcessTransport
from benchmarks.gpu_kernels.stages.ranks import BoxTransfer, ThreadTransport, check_ranks, rank_checks
from benchmarks.gpu_kernels.stages.workers import run_side_by_side
from megamoe.parallel.transport.all_to_all import AllToAllTransfer, AllToAllTransport
from megamoe.parallel.transport.pairs import Label
from tests.test_kernel_call import as_with_kernels

CPU = torch.device("cpu")


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_two_ranks_in_threads_have_the_bits_of_one(weight_format: str, kernels: bool) -> None:
    with as_with_kernels() if kernels else nullcontext():
        found = check_ranks(weight_format, CPU)
    assert (found.passed, found.said) == (True, "")
    assert found.name == f"{weight_format} layer on two ranks of one device, bits of one rank"


def test_both_formats_are_checked() -> None:
    assert [name for name, _ in rank_checks(CPU)] == ["mxfp4 layer, check_ranks", "bf16 layer, check_ranks"]


def test_other_bits_are_found_with_the_number_of_waves() -> None:
    wait = BoxTransfer.wait

    def worse(self: BoxTransfer) -> None:
        wait(self)
        if self._label.phase == "combine" and self._label.wave == 2:
            self._receive[:1] += 1

    with mock.patch.object(BoxTransfer, "wait", worse):
        found = check_ranks("mxfp4", CPU)
    assert (found.passed, found.said) == (False, "others in 3 waves")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_does_not_leave_the_other_waiting(failing: int) -> None:
    gather = ThreadTransport.gather

    def fails(self: ThreadTransport, page: Tensor, label: Label) -> Tensor:
        if self.rank == failing:
            raise OSError("no page")
        return gather(self, page, label)

    begun = time.monotonic()
    with mock.patch.object(ThreadTransport, "gather", fails), pytest.raises((OSError, threading.BrokenBarrierError)):
        check_ranks("mxfp4", CPU)
    assert time.monotonic() - begun < ranks.DEADLINE_S / 2


# ---- a group of one rank ----


@contextmanager
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_a_lone_rank_and_two_in_threads_through_a_group_of_one_have_its_bits(kernels: bool) -> None:
    with group_of_one(), as_with_kernels() if kernels else nullcontext():
        found = [check() for _, check in one_rank.checks(CPU, "gloo")]
    assert [(each.passed, each.said) for each in found] == [(True, "")] * 4
    assert [each.name for each in found[1:3]] == [
        "bf16 layer of one rank through gloo, a lone rank's bits",
        "mxfp4 layer on two ranks whose rows go through gloo, bits of one rank",
    ]


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_a_lone_rank_does_go_through_the_exchange(kernels: bool) -> None:
    """Pages are gathered, and what a collective loses is missing."""
    send = AllToAllTransfer.send

    def loses(self: AllToAllTransfer, rows: Tensor, counts: Sequence[int]) -> None:
        if self._label.phase == "combine":
            self._receive.zero_()
        else:
            send(self, rows, counts)

    gathered = mock.patch.object(AllToAllTransport, "gather", side_effect=RuntimeError("gathered"))
    with group_of_one(), as_with_kernels() if kernels else nullcontext():
        checks = [check for _, check in one_rank.checks(CPU, "gloo")]
        with gathered, pytest.raises(RuntimeError, match="gathered"):
            checks[0]()
        with mock.patch.object(AllToAllTransfer, "send", loses):
            assert checks[2]().said == "others in 1, 3 waves"


# ---- ranks in processes ----


def in_processes(until_s: float = 60.0) -> list[Check]:
    found = list(processes.check_all(Task("cpu", True, time.monotonic() + until_s)))
    assert all(isinstance(each, Check) for each in found)
    return [each for each in found if isinstance(each, Check)]


@interpreted
def test_ranks_in_processes_whose_rows_are_changed_on_the_way_say_so() -> None:
    wait = BoxTransfer.wait

    def worse(self: BoxTransfer) -> None:
        wait(self)
        boxes, label = self._boxes, self._label
        if label.phase == "combine" and label.wave == 2 and isinstance(boxes, ProcessTransport) and boxes.rank == 1:
            self._receive[:1] += 1

    with mock.patch.object(BoxTransfer, "wait", worse):
        found = in_processes()
    assert [each.passed for each in found] == [False, False]
    assert found[0].name == "mxfp4 layer on two processes that share the device's memory, bits of one rank"
    assert found[0].said == "rank 1: others in 3 waves"


@interpreted
def test_a_process_that_dies_does_not_leave_the_other_waiting() -> None:
    gather = ProcessTransport.gather

    def dies(self: ProcessTransport, page: Tensor, label: Label) -> Tensor:
        if self.rank == 1:
            os._exit(3)
        return gather(self, page, label)

    begun = time.monotonic()
    with mock.patch.object(ProcessTransport, "gather", dies), mock.patch.object(processes, "DEADLINE_S", 0.5):
        found = in_processes()
    assert time.monotonic() - begun < 15
    assert [each.passed for each in found] == [False, False]
    assert found[0].said.startswith("rank 0: TimeoutError: rank 1 sent no ('counts', 1, 'mxfp4 1') within 0.5 s")
    assert found[0].said.endswith("rank 1: ended")


# ---- jobs side by side ----


def job(name: str) -> None:
    if name == "exits":
        os._exit(3)
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "raises":
        raise ValueError("first line\nsecond")
    time.sleep(30.0 if name == "hangs" else 0.01)


def test_a_job_that_goes_wrong_takes_none_with_it() -> None:
    names = ["a", "exits", "hangs", "b", "raises", "dies", "c", "d"]
    begun = time.monotonic()
    found = {each.job: each.problem for each in run_side_by_side(job, names, 2, 1.0, begun + 20)}
    assert time.monotonic() - begun < 10
    assert found == {
        **dict.fromkeys(("a", "b", "c", "d")),
        "exits": "the process ended with 3",
        "dies": "the process ended with -9",
        "raises": "ValueError: first line",
        "hangs": "did not end within 1 s",
    }


def test_jobs_that_there_is_no_time_for_say_so() -> None:
    found = {each.job: each.problem for each in run_side_by_side(job, ["hangs", "b"], 1, 60.0, time.monotonic() + 0.3)}
    assert found == {"hangs": "did not end within 0 s", "b": "no time"}
    assert list(run_side_by_side(job, [], 2, 1.0, time.monotonic() + 1)) == []
