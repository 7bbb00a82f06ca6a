"""The layer whose master weights stay another module's: they come with each call, and their gradients go there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from megamoe.execution.experts import Experts
from megamoe.training.experts import MASTER_DTYPES, TrainableExperts
from megamoe.training.layer import TrainableMoE
from megamoe.training.steps import watch


class GivenExperts(TrainableExperts):
    """TrainableExperts without parameters: masters are there during a call alone, so that FSDP can free them."""

    given: tuple[Tensor, ...] = ()
    owners: tuple[Tensor, ...] = ()

    def make_masters(self, dtype: torch.dtype, seed: int, rounding: str) -> None:
        self.rounding, self.rounding_step, self._seed = rounding, 0, seed
        self._quantized = None
        watch(self)
        del dtype

    def values(self) -> tuple[Tensor, ...]:
        return self.given

    def sources(self) -> tuple[Tensor, ...]:
        return self.owners

    def load(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        raise ValueError("this layer's weights come with each call: load them into the module that has them")

    def reset_parameters(self, seed: int) -> None:
        del seed
        self.load()


class GivenMoE(TrainableMoE):
    """TrainableMoE for weights that stay where a framework has them: with layer.given(masters, owners): layer(...)"""

    experts_type: ClassVar[type[Experts]] = GivenExperts
    experts: GivenExperts

    @contextmanager
    def given(self, masters: Sequence[Tensor], owners: Sequence[Tensor]) -> Iterator[None]:
        """The block's calls multiply by masters, and autograd takes their gradients there.

        masters  gate_up [e, 2I, H], down [e, H, I], then gate_up_bias and down_bias where the shape has biases, of this
                 rank's experts; float32 or bfloat16
        owners   the parameters that optimisers change where the masters change. Weights are packed anew where one of
                 these was changed or stepped since they last were.

        ValueError for other shapes and dtypes.
        """
        sizes = [(matrix.outputs, matrix.inputs) for matrix in self.experts.matrices.values()]
        expected: list[tuple[int, ...]] = [*sizes, *([(each[0],) for each in sizes] if self.shape.bias else [])]
        found = [tuple(each.shape) for each in masters]
        if found != [(len(self.local_experts), *each) for each in expected]:
            raise ValueError(f"masters have shapes {found}, expected {expected} of {len(self.local_experts)} experts")
        wrong = [each.dtype for each in masters if each.dtype not in MASTER_DTYPES]
        if wrong:
            raise ValueError(f"weights must be torch.float32 or torch.bfloat16 to be trained, got {wrong[0]}")
        self.experts.given, self.experts.owners = tuple(masters), tuple(owners)
        try:
            yield
        finally:
            self.experts.given = ()
