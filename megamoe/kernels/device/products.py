"""The product inside a tile: MXFP8 rows by MXFP4 weights, or BF16 by BF16, summed in FP32 in the order of K.

On SM100 and gfx950 `tl.dot_scaled` is the chip's own instruction for E4M3 by E2M1 with a scale per 32. SM90 has none,
and there both operands become BF16, which holds E4M3 and E2M1 times a power of two exactly, and BF16 products are
summed in FP32: x beforehand (`widen`), w on its way to the tensor cores (`fp4`). FP8 products would do it with E2M1 as
E4M3, but the sum of every 32 of K would have to leave the matrix unit and be multiplied by two scales: two operations
for each result, 256 cycles of a multiprocessor for 128 x 128 results, where 32 of K take 256 cycles as BF16 and 128 as
FP8. Hopper also sums FP8 products in fewer bits than FP32 has (DeepSeek-V3 report, section 3.3.2).
"""

# K the summed dimension, 32 of it to a scale   N rows of an expert's weight, columns of the result

from __future__ import annotations

import triton
import triton.language as tl

from megamoe.kernels.device.fp4 import bytes_of, decode_e2m1


@triton.jit
def tile_product(
    x,
    x_scales,
    w,
    w_scales,
    source,
    x_stride,
    x_scale_stride,
    expert,
    first_row,
    num_rows,
    first_column,
    K: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OPERAND: tl.constexpr,
    SMALL_SCALES: tl.constexpr,
):
    """A tile [COLUMNS, ROWS] float32 of w[expert] @ x^T: product_mx(), product_wide() where x has no scales, or
    product_bf16() where nothing has.

    What is beyond the last row or column is read as the last one, so that no load has a mask, and nobody takes it.
    Rows lie in x where source says, if there is one, else where they are themselves.
        first_row 5, num_rows 3, ROWS 4  ->  rows 5, 6, 7, 7
    """
    rows = first_row + tl.minimum(tl.arange(0, ROWS), num_rows - 1)
    if source is not None:
        rows = tl.load(source + rows)
    rows = rows.to(tl.int64)
    columns = tl.minimum(first_column + tl.arange(0, COLUMNS), N - 1)
    first = expert.to(tl.int64) * N
    if w_scales is None:
        return product_bf16(x, w + first * K, rows * x_stride, columns, K, DEPTH, OPERAND)
    elif x_scales is None:  # noqa: RET505  Triton compiles what follows a return
        eighths = (rows * (x_stride // 8)).to(tl.int32)
        panel = expert.to(tl.int64) * ((N + 63) // 64) + first_column // 64
        left = (N - first_column + 63) // 64
        return product_wide(x, w, w_scales, eighths, panel, left, K, N, COLUMNS, DEPTH, OPERAND, SMALL_SCALES)
    else:
        w += first * (K // 2)
        w_scales += first * (K // 32)
        return product_mx(x, x_scales, w, w_scales, rows * x_stride, rows * x_scale_stride, columns, K, DEPTH)


@triton.jit
def product_mx(x, x_scales, w, w_scales, rows, scale_rows, columns, K: tl.constexpr, DEPTH: tl.constexpr):
    """[COLUMNS, ROWS] float32 = w [COLUMNS, K] @ x [ROWS, K]^T by the chip's scaled instruction.

    x E4M3 and w packed E2M1, both as uint8, and their scales. rows and scale_rows [ROWS]: where each row of x and of
    its scales starts; columns [COLUMNS]: rows of w, which are K / 2 bytes apart and their scales K / 32
        K 64: a row of x all 1 with scale bytes 128, a row of w all codes 1 (0.5) with 127  ->  64 * 1 * 2 * 0.5 = 64
    """
    WHOLE: tl.constexpr = K % DEPTH == 0
    values, packs, blocks = tl.arange(0, DEPTH), tl.arange(0, DEPTH // 2), tl.arange(0, DEPTH // 32)
    x += rows[None, :] + values[:, None]
    x_scales += scale_rows[:, None] + blocks[None, :]
    w += columns[:, None] * (K // 2) + packs[None, :]
    w_scales += columns[:, None] * (K // 32) + blocks[None, :]
    total = tl.zeros((columns.shape[0], rows.shape[0]), tl.float32)
    for k in range(0, K, DEPTH):
        x_part = load_piece(x, values[:, None], K - k, WHOLE)
        w_part = load_piece(w, packs[None, :], (K - k) // 2, WHOLE)
        x_exponents = load_piece(x_scales, blocks[None, :], (K - k) // 32, WHOLE)
        w_exponents = load_piece(w_scales, blocks[None, :], (K - k) // 32, WHOLE)
        # fast_math: a block of x with scale byte 255 has NaN for values already, none need be put in their place
        total = tl.dot_scaled(w_part, w_exponents, "e2m1", x_part, x_exponents, "e4m3", total, fast_math=True)
        x += DEPTH
        w += DEPTH // 2
        x_scales += DEPTH // 32
        w_scales += DEPTH // 32
    return total


@triton.jit
def product_wide(
    x,
    w,
    w_scales,
    rows,
    panel,
    panels_left,
    K: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OPERAND: tl.constexpr,
    SMALL_SCALES: tl.constexpr,
):
    """product_mx() of x that is BF16 in the order of the sum (`layout.Wide`), by weights decoded to OPERAND.

    rows [ROWS] int32: where each row of x starts, in eighths, for 64 bits of each are more registers than there are;
    w int32 and w_scales uint8 as in `layout.Prepacked`: the tile begins with panel `panel` of all, and its expert has
    panels_left from there on. DEPTH is a multiple of 128: a thread takes the scales of 128 values in one word, since
    fewer bytes are not copied ahead. OPERAND tl.bfloat16; tl.float32 in the interpreter, which multiplies no BF16
    """
    CHUNKS: tl.constexpr = (K + 127) // 128
    WHOLE: tl.constexpr = K % DEPTH == 0
    WHOLE_CHUNKS: tl.constexpr = CHUNKS * 128 % DEPTH == 0
    values, packs, chunks = tl.arange(0, DEPTH), tl.arange(0, DEPTH // 8), tl.arange(0, DEPTH // 128)
    columns = tl.arange(0, COLUMNS)
    panels = columns // 64
    if (N + 63) // 64 % (COLUMNS // 64) != 0:
        panels = tl.minimum(panels, panels_left - 1)
    w += panel * (CHUNKS * 1024)
    words = (panels * (CHUNKS * 1024) + columns % 64 * 16)[:, None] + (packs // 16 * 1024 + packs % 16)[None, :]
    w_scales = w_scales.to(tl.pointer_type(tl.int32)) + panel * (CHUNKS * 64)
    scales = (panels * (CHUNKS * 64) + columns % 64)[:, None] + (chunks * 64)[None, :]
    total = tl.zeros((COLUMNS, rows.shape[0]), tl.float32)
    for k in range(0, K, DEPTH):
        x_rows = x + (rows.to(tl.int64) * 8)[None, :]
        x_part = load_piece(x_rows + values[:, None], values[:, None], K - k, WHOLE).to(OPERAND)
        w_part = load_piece(w + words, packs[None, :] // 16, CHUNKS - k // 128, WHOLE_CHUNKS)
        exponents = bytes_of(load_piece(w_scales + scales, chunks[None, :], CHUNKS - k // 128, WHOLE_CHUNKS))
        total = tl.dot(decode_e2m1(w_part, exponents, OPERAND, SMALL_SCALES), x_part, total)
        x += DEPTH
        w += DEPTH * 8
        w_scales += DEPTH // 2
    return total


@triton.jit
def product_bf16(x, w, rows, columns, K: tl.constexpr, DEPTH: tl.constexpr, OPERAND: tl.constexpr):
    """product_mx() of BF16 x and w, OPERAND as in product_wide()."""
    WHOLE: tl.constexpr = K % DEPTH == 0
    values = tl.arange(0, DEPTH)
    x += rows[None, :] + values[:, None]
    w += columns[:, None] * K + values[None, :]
    total = tl.zeros((columns.shape[0], rows.shape[0]), tl.float32)
    for k in range(0, K, DEPTH):
        x_part = load_piece(x, values[:, None], K - k, WHOLE).to(OPERAND)
        w_part = load_piece(w, values[None, :], K - k, WHOLE).to(OPERAND)
        total = tl.dot(w_part, x_part, total)
        x += DEPTH
        w += DEPTH
    return total


@triton.jit
def load_piece(pointers, places, left, WHOLE: tl.constexpr):
    """What pointers point at; zero where places are not below what is left of K, unless K is made of whole steps."""
    if WHOLE:
        return tl.load(pointers)
    else:  # noqa: RET505
        return tl.load(pointers, mask=places < left, other=0)
