"""What a layer must know of a format of expert weights, one object each: `formats.WEIGHT_FORMATS` by name."""

# N outputs   K inputs

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megamoe.formats.mxfp4 import MXFP4

VALUES, SCALES = "", "_scales"  # what a matrix's name is followed by in a state dict and where it is held
Weight: TypeAlias = "Tensor | MXFP4"
Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]


class WeightFormat(ABC):
    """A format of weights [N, K].

    name          as users write it
    block         what K must be a multiple of, 1 where any size will do
    activations   format to which rows are rounded before each product, None where they stay BF16
    decodes       dense() computes something, so that a copy of what it gives is worth keeping
    kernels       this package's kernels read it; else torch multiplies what dense() gives
    """

    name: ClassVar[str]
    block: ClassVar[int]
    activations: ClassVar[str | None]
    decodes: ClassVar[bool] = True
    kernels: ClassVar[bool] = False

    @abstractmethod
    def parts(self, outputs: int, inputs: int) -> Parts:
        """Shapes and dtypes of the tensors that hold a matrix, as weights come and as a state dict has them."""

    @abstractmethod
    def take(self, weight: Weight) -> Weight:
        """weight in this format, converted where it comes in another. ValueError where a value has no code in it."""

    @abstractmethod
    def refuse(self, weight: Weight) -> None:
        """ValueError where take() would raise it, found without converting what is in order."""

    @abstractmethod
    def split(self, weight: Weight) -> dict[str, Tensor]:
        """What take() gave, as the tensors of parts()."""

    @abstractmethod
    def join(self, parts: Mapping[str, Tensor]) -> Weight:
        """Inverse of split()."""

    @abstractmethod
    def dense(self, weight: Weight, out: Tensor | None = None) -> Tensor:
        """What take() gave as bfloat16 [N, K], exact, in `out` if there is one."""
