"""How a device holds the weights of its experts: in the order in which what multiplies by them reads them.

Each layout says what it holds for a matrix, packs one matrix, and gives stacks of them back as they came.
"""

# e experts   N outputs   K inputs

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.formats import MXFP4, SCALES, VALUES, WeightFormat
from megamoe.kernels.cpu.layout import bf16_shape, mxfp4_shapes, pack_bf16, pack_mxfp4, unpack_bf16, unpack_mxfp4
from megamoe.kernels.layout import interleave_gate_up, prepack, prepacked_shapes, separate_gate_up, unprepack


@dataclass(frozen=True, slots=True)
class Matrix:
    """What is known of one of an expert's matrices: weight [outputs, inputs] in a format.

    name    "gate_up" or "down"
    gated   whether the first half of rows are the gate's, which some layouts have in turns with the others
    """

    name: str
    outputs: int
    inputs: int
    format: WeightFormat
    gated: bool = False

    def plain(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes as weights come, and as a state dict has them."""
        return self.format.parts(self.outputs, self.inputs)

    @property
    def packed(self) -> bool:
        """Whether it is MXFP4, of which some layouts have an order of their own."""
        return self.format.name == "mxfp4"


class Layout(ABC):
    """How matrices are held."""

    @abstractmethod
    def buffers(self, matrix: Matrix) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes of what is held for one expert."""

    @abstractmethod
    def pack(self, matrix: Matrix, weight: MXFP4 | Tensor) -> dict[str, Tensor]:
        """One expert's weight as it is held."""

    def pack_into(self, matrix: Matrix, weight: MXFP4 | Tensor, places: Mapping[str, Tensor]) -> None:
        """pack() to where it is held: places as buffers() has them."""
        for key, part in self.pack(matrix, weight).items():
            places[key].copy_(part)

    @abstractmethod
    def unpack(self, matrix: Matrix, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stacks [e, ...] of what is held, as in Matrix.plain()."""

    def pack_bias(self, matrix: Matrix, bias: Tensor) -> Tensor:  # noqa: ARG002
        """A bias [..., N] in the order of the product's columns."""
        return bias

    def unpack_bias(self, matrix: Matrix, held: Tensor) -> Tensor:  # noqa: ARG002
        """Inverse of pack_bias()."""
        return held


class RowMajor(Layout):
    """As weights come."""

    def buffers(self, matrix: Matrix) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return matrix.plain()

    def pack(self, matrix: Matrix, weight: MXFP4 | Tensor) -> dict[str, Tensor]:
        return matrix.format.split(weight)

    def unpack(self, matrix: Matrix, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: held[key] for key in matrix.plain()}


class InTurns(RowMajor):
    """Gate and up rows in turns, as the Triton kernels read them where the chip multiplies MXFP4."""

    def pack(self, matrix: Matrix, weight: MXFP4 | Tensor) -> dict[str, Tensor]:
        rows = super().pack(matrix, weight)
        return {key: interleave_gate_up(each) for key, each in rows.items()} if matrix.gated else rows

    def unpack(self, matrix: Matrix, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rows = super().unpack(matrix, held)
        return {key: separate_gate_up(each) for key, each in rows.items()} if matrix.gated else rows

    def pack_bias(self, matrix: Matrix, bias: Tensor) -> Tensor:
        return interleave_gate_up(bias.unsqueeze(-1)).squeeze(-1) if matrix.gated else bias

    def unpack_bias(self, matrix: Matrix, held: Tensor) -> Tensor:
        return separate_gate_up(held.unsqueeze(-1)).squeeze(-1) if matrix.gated else held


class Panels(InTurns):
    """Gate and up rows in turns, MXFP4 prepacked: as the Triton kernels read them where the chip multiplies BF16."""

    def buffers(self, matrix: Matrix) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if not matrix.packed:
            return super().buffers(matrix)
        words, scales = prepacked_shapes(matrix.outputs, matrix.inputs)
        return {VALUES: (words, torch.int32), SCALES: (scales, torch.uint8)}

    def pack(self, matrix: Matrix, weight: MXFP4 | Tensor) -> dict[str, Tensor]:
        rows = super().pack(matrix, weight)
        if not matrix.packed:
            return rows
        words, scales = prepack(MXFP4(rows[VALUES], rows[SCALES]))
        return {VALUES: words, SCALES: scales}

    def unpack(self, matrix: Matrix, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not matrix.packed:
            return super().unpack(matrix, held)
        plain = unprepack(held[VALUES], held[SCALES], matrix.outputs, matrix.inputs)
        return super().unpack(matrix, {VALUES: plain.packed, SCALES: plain.scales})


class Blocks(Layout):
    """Blocks of 32 outputs, as the CPU's kernels read them; order: of MXFP4, as pack_mxfp4() has it."""

    def __init__(self, order: str) -> None:
        self.order = order

    def buffers(self, matrix: Matrix) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if not matrix.packed:
            return {VALUES: (bf16_shape(matrix.outputs, matrix.inputs), torch.bfloat16)}
        values, scales = mxfp4_shapes(matrix.outputs, matrix.inputs)
        return {VALUES: (values, torch.uint8), SCALES: (scales, torch.uint8)}

    def pack(self, matrix: Matrix, weight: MXFP4 | Tensor) -> dict[str, Tensor]:
        assert isinstance(weight, MXFP4) == matrix.packed
        if not isinstance(weight, MXFP4):
            return {VALUES: pack_bf16(weight)}
        packed, scales = pack_mxfp4(weight, self.order)
        return {VALUES: packed, SCALES: scales}

    def pack_into(self, matrix: Matrix, weight: MXFP4 | Tensor, places: Mapping[str, Tensor]) -> None:
        assert isinstance(weight, MXFP4) == matrix.packed
        if isinstance(weight, MXFP4):
            pack_mxfp4(weight, self.order, (places[VALUES], places[SCALES]))
        else:
            pack_bf16(weight, places[VALUES])

    def unpack(self, matrix: Matrix, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not matrix.packed:
            return {VALUES: unpack_bf16(held[VALUES], matrix.outputs, matrix.inputs)}
        plain = unpack_mxfp4(held[VALUES], held[SCALES], matrix.outputs, self.order)
        return {VALUES: plain.packed, SCALES: plain.scales}
