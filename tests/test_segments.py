"""Segments of rows, expanded on the host and by the operations that a GPU is given, with CPU tensors for both."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from megamoe.parallel.workspace import Workspace
from megamoe.routing.segments import Segments, expand_all, repeat, select, to_device, to_host

CPU = torch.device("cpu")


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as_on_a_gpu"])
@pytest.mark.parametrize("lengths", [[2, 0, 3], [0], [], [4], [0, 0, 1]], ids=str)
def test_segments_are_expanded_number_by_number(lengths: list[int], gpu: bool) -> None:
    firsts = np.array([[10, 5, 7], [0, 100, -3]])[:, : len(lengths)]
    sizes = np.array(lengths, dtype=np.int64)
    expected = [
        [first + i for first, length in zip(row, lengths, strict=True) for i in range(length)]
        for row in firsts.tolist()
    ]
    with mock.patch("megamoe.routing.segments.on_host", return_value=not gpu):
        numbers, others = expand_all((Segments(sizes, firsts),) * 2, (sizes,), CPU, Workspace(), "test")
        assert [each.tolist() for each in numbers] == [expected] * 2
        assert [each.tolist() for each in others] == [lengths]
        assert repeat(torch.from_numpy(firsts), others[0], sum(lengths)).tolist() == [
            [first for first, length in zip(row, lengths, strict=True) for _ in range(length)]
            for row in firsts.tolist()
        ]


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as_on_a_gpu"])
@pytest.mark.parametrize("mask", [[True, False, True], [False] * 3, [True] * 3, []], ids=str)
def test_what_is_selected_keeps_its_order(mask: list[bool], gpu: bool) -> None:
    values, bits = torch.tensor([7, 8, 9])[: len(mask)], torch.tensor(mask, dtype=torch.bool)
    with mock.patch("megamoe.routing.segments.on_host", return_value=not gpu):
        found = select(values, bits, bits.cumsum(0), sum(mask))
    assert found.tolist() == [value for value, each in zip([7, 8, 9], mask, strict=False) if each]


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as_on_a_gpu"])
def test_arrays_keep_their_shapes_and_what_comes_back_is_the_hosts_own(gpu: bool) -> None:
    arrays, workspace = (np.arange(6).reshape(2, 3), np.arange(2), np.zeros((0, 4), np.int64)), Workspace()
    with mock.patch("megamoe.routing.segments.on_host", return_value=not gpu):
        there = to_device(arrays, CPU, workspace, "there")
        assert [each.tolist() for each in there] == [array.tolist() for array in arrays]
        counts = torch.tensor([1, 2])
        with mock.patch("torch.cuda.current_stream"):
            back = to_host(counts, workspace, "back")
            again = to_host(counts + 1, workspace, "back")
    assert (back.tolist(), again.tolist()) == ([1, 2], [2, 3])
