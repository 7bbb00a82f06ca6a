"""Ranks that are threads of one process, with which a single GPU's exchange is checked: right on a CPU, never stuck."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks.gpu_kernels import ranks
from benchmarks.gpu_kernels.ranks import ThreadTransfer, ThreadTransport, check_ranks, rank_checks
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
    wait = ThreadTransfer.wait

    def worse(self: ThreadTransfer) -> None:
        wait(self)
        if self._label.phase == "combine" and self._label.wave == 2:
            self._receive[:1] += 1

    with mock.patch.object(ThreadTransfer, "wait", worse):
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
    assert time.monotonic() - begun < ranks._DEADLINE_S / 2
