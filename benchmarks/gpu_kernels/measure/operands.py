"""What the products of one shape are measured on: weights in both formats, copies of them that take turns, and rows."""

# M tokens   R rows, sorted by expert   e experts of this rank   H hidden   I intermediate   K top-k

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu_kernels.measure.clock import Clock
from benchmarks.gpu_kernels.measure.shapes import Shape
from megamoe.activations import SWIGLU
from megamoe.formats import BLOCK, MXFP4, MXFP8
from megamoe.kernels.chips.targets import reads_wide
from megamoe.kernels.chips.tiles import Tile
from megamoe.kernels.grouped import Grouped
from megamoe.kernels.grouped_linear1 import grouped_linear1
from megamoe.kernels.grouped_linear2 import grouped_linear2
from megamoe.kernels.layout import Prepacked, Wide
from megamoe.kernels.quantize import quantize
from megamoe.routing.wire import Wire

Plain = MXFP4 | Tensor  # a weight in its format's own layout
Weight = MXFP4 | Prepacked | Tensor  # as products take it
Operand = MXFP8 | Wide | Tensor
FORMATS = ("mxfp4", "bf16")
_E2M1_RMS = 2.93  # of all sixteen codes


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights for one kind of product: copies of gate_up [e, 2I, H], gate and up rows in turns, and of down [e, H, I].

    plain   the first copies in the format's own layout, by which errors are found
    """

    gate_up: list[Weight]
    down: list[Weight]
    plain: dict[str, Plain]

    @classmethod
    def made(cls, shape: Shape, kind: str, clock: Clock) -> Weights:
        """Random ones, of such a size that the results of both products are about 1."""
        sizes = shape.sizes
        matrices = {
            "gate_up": (2 * sizes.intermediate, sizes.hidden),
            "down": (sizes.hidden, sizes.intermediate),
        }
        make = random_bf16 if kind == "bf16" else random_mxfp4
        plain, stacks = dict[str, Plain](), dict[str, list[Weight]]()
        for seed, (name, size) in enumerate(matrices.items()):
            plain[name] = make((sizes.num_experts, *size), seed, clock.device)
            first = weight_as(kind, plain[name])
            copies = clock.copies(num_bytes(first)) - 1
            stacks[name] = [first, *(mapped(first, torch.clone) for _ in range(copies))]
        return cls(**stacks, plain=plain)

    def of_experts(self, num_experts: int) -> Weights:
        """Those of the first experts, in place; plain are all."""

        def first(weight: Weight) -> Weight:
            return mapped(weight, lambda part: part[:num_experts])

        return Weights(list(map(first, self.gate_up)), list(map(first, self.down)), self.plain)


def weight_as(kind: str, weight: Plain) -> Weight:
    """A weight as the products of a kind take it."""
    return Prepacked.of(weight) if kind == "wide" and isinstance(weight, MXFP4) else weight


def mapped(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    """A weight with something done to each of its parts."""
    if isinstance(weight, Prepacked):
        return replace(weight, words=change(weight.words), scales=change(weight.scales))
    return MXFP4(change(weight.packed), change(weight.scales)) if isinstance(weight, MXFP4) else change(weight)


def random_mxfp4(size: tuple[int, int, int], seed: int, device: torch.device) -> MXFP4:
    """Any codes, scales within a factor of 4, so that products with x of about 1 are of about 1."""
    generator = torch.Generator(device).manual_seed(seed)
    experts, rows, depth = size
    middle = 127 - round(math.log2(_E2M1_RMS * math.sqrt(depth)))
    packed = torch.randint(0, 256, (experts, rows, depth // 2), dtype=torch.uint8, device=device, generator=generator)
    scales = (experts, rows, depth // BLOCK)
    return MXFP4(
        packed, torch.randint(middle - 1, middle + 2, scales, dtype=torch.uint8, device=device, generator=generator)
    )


def random_bf16(size: tuple[int, int, int], seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.empty(size, dtype=torch.bfloat16, device=device)
    return weight.normal_(0, 1 / math.sqrt(size[2]), generator=generator)


def parts(operand: Plain | Weight | Operand) -> list[Tensor]:
    """The values and, where there are any, their scales."""
    if isinstance(operand, MXFP4):
        return [operand.packed, operand.scales]
    if isinstance(operand, Prepacked):
        return [operand.words, operand.scales]
    if isinstance(operand, MXFP8):
        return [operand.values, operand.scales]
    return [operand.values if isinstance(operand, Wide) else operand]


def num_bytes(operand: Plain | Weight | Operand) -> int:
    return sum(each.numel() * each.element_size() for each in parts(operand))


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a rank's experts, the same number of each, and the tokens that they are.

    tokens              [M, H] bfloat16, M = R / K
    tokens_per_expert   [e] int32
    source              [R] int32: token of each row
    weights             [R] float32
    """

    tokens: Tensor
    tokens_per_expert: Tensor
    source: Tensor
    weights: Tensor

    @classmethod
    def made(cls, shape: Shape, rows_per_expert: int, device: torch.device) -> Rows:
        """Every token about K times, in the order of tokens for each expert, as a layer has them."""
        generator = torch.Generator(device).manual_seed(rows_per_expert)
        experts = shape.sizes.num_experts
        num_rows = experts * rows_per_expert
        num_tokens = max(1, num_rows // shape.sizes.topk)
        drawn = torch.randperm(num_rows, device=device, generator=generator) % num_tokens
        return cls(
            torch.randn(num_tokens, shape.sizes.hidden, device=device, generator=generator).to(torch.bfloat16),
            torch.full((experts,), rows_per_expert, dtype=torch.int32, device=device),
            drawn.view(experts, rows_per_expert).sort(1).values.flatten().to(torch.int32),
            torch.rand(num_rows, device=device, generator=generator) + 0.25,
        )

    @property
    def num_rows(self) -> int:
        return len(self.source)


@dataclass(frozen=True, slots=True)
class Products:
    """Both products of one format on the same rows. linear1() writes hidden, which linear2() reads.

    kind            of product: mxfp4, wide or bf16
    x               [M, H] the tokens as the layer has them for Linear-1: MXFP8, Wide or bfloat16
    first, second   what each multiplies, for every copy of the weights
    weights         [R] float32, by which the activation is multiplied
    hidden          [R, I] of the kind of x
    index           [R] int64: row r's place in out
    out             [R, H] bfloat16
    """

    kind: str
    x: Operand
    first: list[Grouped]
    second: list[Grouped]
    weights: Tensor
    limit: float | None
    hidden: Operand
    index: Tensor
    out: Tensor

    @classmethod
    def made(cls, rows: Rows, weights: Weights, limit: float | None, kind: str) -> Products:
        """Of the kind that the weights are for (kind_of)."""
        (_, width, depth), device, counts = weights.gate_up[0].shape, rows.source.device, rows.tokens_per_expert
        x, hidden = tokens_as(kind, rows.tokens), empty_operand(kind, rows.num_rows, width // 2, device)
        return cls(
            kind,
            x,
            [Grouped(x, each, counts, rows.source) for each in weights.gate_up],
            [Grouped(hidden, each, counts) for each in weights.down],
            rows.weights,
            limit,
            hidden,
            torch.arange(rows.num_rows, device=device),
            torch.empty(rows.num_rows, depth, dtype=torch.bfloat16, device=device),
        )

    def linear1(self, turn: int = 0, tile: Tile | None = None) -> None:
        activation = SWIGLU.with_limit(self.limit)
        grouped_linear1(self.first[turn % len(self.first)], self.weights, activation, self.hidden, tile=tile)

    def linear2(self, turn: int = 0, tile: Tile | None = None) -> None:
        grouped_linear2(self.second[turn % len(self.second)], self.index, self.out, tile=tile)

    def both(self, turn: int = 0, tile: Tile | None = None) -> None:
        self.linear1(turn, tile)
        self.linear2(turn, tile)

    def poison(self) -> None:
        """Makes every byte that the products should write a NaN's."""
        for each in (*parts(self.hidden), self.out):
            each.view(torch.uint8).fill_(0xFF)


def kind_of(weight_format: str, device: torch.device) -> str:
    """The kind of product that the layer runs: "wide" for MXFP4 weights on chips that multiply them as BF16."""
    return "wide" if weight_format == "mxfp4" and reads_wide(device) else weight_format


def tokens_as(kind: str, tokens: Tensor) -> Operand:
    """tokens [M, H] bfloat16 as Linear-1 reads them: as they are, widened, or MXFP8 in rows of the wire"""
    if kind == "bf16":
        return tokens
    num_tokens, hidden = tokens.shape
    x = empty_operand(kind, num_tokens, hidden, tokens.device)
    if isinstance(x, MXFP8):
        rows = torch.zeros(num_tokens, Wire("mxfp8", hidden, False).row_bytes, dtype=torch.uint8, device=tokens.device)
        x = MXFP8(rows[:, :hidden].view(torch.float8_e4m3fn), rows[:, hidden : hidden + hidden // BLOCK])
    assert isinstance(x, MXFP8 | Wide)
    quantize(tokens, None, x)
    return x


def empty_operand(kind: str, num_rows: int, width: int, device: torch.device) -> Operand:
    """[R, W] of that kind."""
    if kind == "mxfp4":
        values = torch.empty(num_rows, width, dtype=torch.uint8, device=device)
        scales = torch.empty(num_rows, width // BLOCK, dtype=torch.uint8, device=device)
        return MXFP8(values.view(torch.float8_e4m3fn), scales)
    rows = torch.empty(num_rows, width, dtype=torch.bfloat16, device=device)
    return Wide(rows) if kind == "wide" else rows


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """torch's own: x [R, K] bfloat16 by weight [e, N, K], ends [e] int32 where each expert's rows end -> [R, N]"""
    call: Callable[..., Tensor] = getattr(torch.nn.functional, "grouped_mm", torch._grouped_mm)
    return call(x, weight.transpose(1, 2), offs=ends)


def grouped_mm_note(device: torch.device) -> str | None:
    """None where grouped_mm is queued like any other; else what its rows have to say of it.

    torch falls back to a loop over experts, which waits for the device to learn their rows, where it has no kernel for
    a device or a layout, and does not say so.
    """
    if device.type != "cuda":
        return None
    x, weight = (torch.zeros(size, dtype=torch.bfloat16, device=device) for size in ((32, 512), (4, 256, 512)))
    ends = torch.tensor([1, 16, 16, 32], dtype=torch.int32, device=device)
    grouped_mm(x, weight, ends)
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_mm(x, weight, ends)
    except RuntimeError:
        return "torch's fallback, which waits for the host: no kernel of grouped_mm ran"
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return None


def unfused_linear1(products: Products, tile: Tile | None = None) -> Callable[[int], None]:
    """Linear-1 with its 2I columns through memory: the same product, torch's BF16 activation, the same rounding.

    The weights' rows are taken for those of the gate first, so that torch has halves to work on; the time is the same.
    """
    num_rows, width, device = len(products.index), products.first[0].num_columns, products.out.device
    gate_up = torch.empty(num_rows, width, dtype=torch.bfloat16, device=device)
    hidden = products.hidden
    assert isinstance(hidden, MXFP8 | Wide)
    weights, limit = products.weights.to(torch.bfloat16).unsqueeze(1), products.limit

    def run(turn: int) -> None:
        grouped_linear2(products.first[turn % len(products.first)], products.index, gate_up, tile=tile)
        gate, up = gate_up.chunk(2, -1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        quantize(torch.nn.functional.silu(gate).mul_(up).mul_(weights), None, hidden)

    return run
