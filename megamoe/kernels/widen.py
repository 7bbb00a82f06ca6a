"""Rows of MXFP8 to BF16 in the order of the sum, once, for chips that multiply them as BF16.

Else each tile would decode its rows, and every tile of the same rows again. Compiled for SM90, a step of a tile of 256
rows and 128 columns is 584 to 632 instructions for each scheduler, where the tensor cores need 2048 cycles for it. With
rows decoded in the tile 128 by 128 was the largest that had the registers, and the tensor cores waited meanwhile: now
one matrix instruction is in flight while the next weights are decoded (Triton 3.9, `megamoe.kernels.ahead`; not timed).
"""

# M rows of x   R rows that are widened   K what is summed over, G = K / 32 blocks of it

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megamoe.formats import BLOCK, MXFP8, dequantize_mxfp8
from megamoe.kernels.chips.targets import OPTIONS, Build, Target
from megamoe.kernels.device.rounding import widen_block
from megamoe.kernels.layout import Wide, in_sum_order

_BLOCKS, _NUM_WARPS = 64, 4


@triton.jit(do_not_specialize_on_alignment=["x_scales"])
def _widen_kernel(x, x_scales, out, width, x_stride, x_scale_stride, out_stride, BLOCKS: tl.constexpr):
    """One program: BLOCKS blocks of one row, of width values in all.

    codes of a block 0x38 (1.0) in place 4, else 0, scale byte 128  ->  2.0 in place 1, the order of the sum, else 0
    """
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * 32 + tl.arange(0, 32)[None, :]
    codes = tl.load(x + row * x_stride + columns, mask=columns < width, other=0)
    exponents = tl.load(x_scales + row * x_scale_stride + blocks, mask=blocks * 32 < width, other=0)
    tl.store(out + row * out_stride + columns, widen_block(codes, exponents), mask=columns < width)


def widen(x: MXFP8, out: Wide) -> None:
    """Rows of x [R, K] to out [R, K]; both may be rows of wider buffers."""
    values, (num_rows, width) = x.values.view(torch.uint8), out.values.shape
    if not num_rows:
        return
    _widen_kernel[(num_rows, triton.cdiv(width // BLOCK, _BLOCKS))](
        values,
        x.scales,
        out.values,
        width,
        values.stride(0),
        x.scales.stride(0),
        out.values.stride(0),
        BLOCKS=_BLOCKS,
        num_warps=_NUM_WARPS,
        **OPTIONS,
    )


def widen_torch(x: MXFP8, out: Wide) -> None:
    """What widen() means."""
    out.values.copy_(in_sum_order(dequantize_mxfp8(x)))


def builds(_: Target) -> list[Build]:
    """The one there is."""
    strides = ("width", "x_stride", "x_scale_stride", "out_stride")
    signature = {"x": "*u8", "x_scales": "*u8", "out": "*bf16", **dict.fromkeys(strides, "i32"), "BLOCKS": "constexpr"}
    return [
        Build(
            label=f"{_BLOCKS} blocks",
            kernel=_widen_kernel,
            signature=signature,
            constants={"BLOCKS": _BLOCKS},
            aligned=frozenset({"x", "out", *strides}),
            num_warps=_NUM_WARPS,
        )
    ]
