"""The operations of the layer, each with one meaning: the torch body runs on every device and is the oracle.

CPUs run kernels in C++ where they can be built, and devices with Triton kernels run those, imported when the first of
them is called.

Bitwise contract: a row's result depends on that row alone, not on how many rows stand beside it, where it stands
among them, or how many threads work. Element-wise operations keep it by being correctly rounded each; an activation's
function keeps it as a table over all BF16 values; a matrix product keeps it by its order of summation: see products.py.
"""

# n rows   H hidden   I intermediate   T tokens   K experts per token   N rows that came home

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megamoe.activations import Activation
from megamoe.formats import MXFP8, chunks, dequantize_mxfp8, quantize_mxfp8, take_rows
from megamoe.kernels import load
from megamoe.kernels.chips.targets import TARGETS, chip_of
from megamoe.kernels.cpu.library import chosen
from megamoe.kernels.gating import Tables, activate_fp32

if TYPE_CHECKING:
    from megamoe.kernels.grouped import Grouped
    from megamoe.kernels.layout import Wide
    from megamoe.kernels.quantize import Filling
    from megamoe.kernels.route_slots import SlotsByExpert


def activate(gate_up: Tensor, weights: Tensor, tables: Tables, *, quantized: bool, out: Tensor | None = None) -> Tensor:
    """Linear-2's input from Linear-1's output: activated, rounded to MXFP8 (quantized) or to BF16.

    gate_up [n, 2I] bfloat16, gate first, or [n, I] without a gate; weights [n] float32 -> [n, I] bfloat16
    """
    num_rows, width = gate_up.shape
    width //= tables.activation.rows_per_output
    out = gate_up.new_empty(num_rows, width) if out is None else out
    library = chosen() if gate_up.device.type == "cpu" else None
    if library is not None:
        library.activate(gate_up, weights.contiguous(), tables, quantized=quantized, out=out)
        return out
    for rows in chunks(num_rows, width):
        activated = activate_fp32(gate_up[rows], weights[rows], tables)
        if quantized:
            dequantize_mxfp8(quantize_mxfp8(activated), out=out[rows])
        else:
            out[rows] = activated
    return out


def add_bias(
    sums: Tensor,
    bias: Tensor,
    counts: Tensor,
    out: Tensor,
    *,
    weights: Tensor | None = None,
    goes: Tensor | None = None,
) -> None:
    """Each row's sums and its expert's bias, the bias times the row's weight where there are weights, in out.

    One FP32 product, one FP32 sum, one rounding to BF16: sums [n, N] float32, rows sorted by expert; bias [e, N]
    float32; counts [e] int64; weights [n] float32; out [., N] bfloat16, where row r goes to goes[r], [n] int64
        counts [1, 2], bias [b, c], weights [2, 1, 3]  ->  sums[0] + 2b, sums[1] + c, sums[2] + 3c
    """
    library = chosen() if sums.device.type == "cpu" else None
    if library is not None:
        library.add_bias(sums, bias, counts, out, weights, goes)
        return
    begin = 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(begin, begin + count)
        begin += count
        added = bias[expert] if weights is None else weights[rows].unsqueeze(-1) * bias[expert]
        out[rows if goes is None else goes[rows]] = (sums[rows] + added).to(torch.bfloat16)


def encode_rows(x: Tensor, goes: Tensor, out: MXFP8) -> None:
    """Rounds rows x [n, H] bfloat16 to MXFP8, row r into row goes[r] of out [R, H]; goes [n] int64, each another row.

    out's tensors may be columns of wider buffers. What no row goes to stays as it is. Kernels of GPUs: quantize().
        x [a, b], goes [2, 0]  ->  out [mxfp8(b), ., mxfp8(a)]
    """
    library = chosen() if x.device.type == "cpu" else None
    if library is not None:
        library.quantize(x, out, goes)
        return
    values = out.values.view(torch.uint8)
    for part in chunks(*x.shape):
        rounded = quantize_mxfp8(x[part])
        values[goes[part]], out.scales[goes[part]] = rounded.values.view(torch.uint8), rounded.scales


def reduce_slots(rows: Tensor | MXFP8, positions: Tensor) -> Tensor:
    """Sums each token's rows in ascending slot order in FP32 from zero, rounds once to BF16.

    rows [N + 1, H] bfloat16 or MXFP8, the last one zero; positions [T, K] int64, N for a masked slot -> [T, H] bfloat16
        rows = [a, b, c, 0]   positions = [[2, 0], [3, 1]]  ->  [c + a, b]
    Adding the zero row changes no bit: a sum that starts from +0 is never -0.
    """
    device = positions.device
    if has_kernels(device):
        summed: Tensor = _body("reduce_slots", device)(rows, positions)
        return summed
    (num_tokens, topk), width = positions.shape, (rows if isinstance(rows, Tensor) else rows.values).shape[1]
    out = torch.empty(num_tokens, width, dtype=torch.bfloat16, device=device)
    library = chosen() if device.type == "cpu" else None
    if library is not None:
        library.reduce_slots(rows, positions, out)
        return out
    for part in chunks(num_tokens, width):
        chunk = positions[part]
        total = torch.zeros(len(chunk), width, dtype=torch.float32, device=device)
        for slot in range(topk):
            total += take_rows(rows, chunk[:, slot])
        out[part] = total
    return out


# ---- what devices with Triton kernels run: kernels/ says what each operation does ----


@lru_cache(maxsize=16)
def has_kernels(device: torch.device) -> bool:
    """Whether the layer runs Triton kernels on this device: on NVIDIA and AMD GPUs of chips that there are some for.

    Other GPUs, and those of a machine without Triton, run the torch bodies above.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return chip_of(device) in {target.name for target in TARGETS}


def quantize(tokens: Tensor, filling: Filling | None, out: MXFP8 | Wide) -> None:
    """Tokens [T, H] bfloat16 rounded to MXFP8, each into the rows of out [R, H] that it fills, by default its own."""
    _body("quantize", tokens.device)(tokens, filling, out)


def route_slots(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> SlotsByExpert:
    """The (token, slot) pairs of topk_ids and topk_weights [T, K] by expert, and whether any value is wrong."""
    slots: SlotsByExpert = _body("route_slots", topk_ids.device)(topk_ids, topk_weights, num_experts)
    return slots


def widen(x: MXFP8, out: Wide) -> None:
    """Rows [R, K] of MXFP8 as BF16 in the order in which products sum."""
    _body("widen", x.scales.device)(x, out)


def grouped_linear1(grouped: Grouped, weights: Tensor, activation: Activation, out: MXFP8 | Wide | Tensor) -> None:
    """Linear-1 and the activation of rows sorted by expert -> out [R, I], which Linear-2 reads; weights [R] float32."""
    _body("grouped_linear1", weights.device)(grouped, weights, activation, out)


def grouped_linear2(grouped: Grouped, index: Tensor, out: Tensor, weights: Tensor) -> None:
    """Linear-2 of rows sorted by expert; row r goes to out[index[r]], bfloat16 [W, H]; index [R] int64.

    weights [R] float32, by which a bias is multiplied
    """
    _body("grouped_linear2", index.device)(grouped, index, out, weights)


def _body(name: str, device: torch.device) -> Any:
    """An operation's kernel, or what it means where the device runs none."""
    return getattr(load(name), name if has_kernels(device) else f"{name}_torch")
