"""Decoding weights for chips whose matrix units know neither E2M1 nor scales: to BF16, exactly, as costs least.

A prepacked word (`layout.Prepacked`) holds eight E2M1 codes. Moved by a few bits and masked, two of them, four apart,
are two BF16 numbers of 2^-126 of their values (0.5 is a subnormal then, which BF16 products keep), and lie as a
register of the matrix instruction has two neighbours of K. So each 32 of K are summed in another order than they have
in memory, into which x is put when it is widened (`layout.Wide`). A multiplication by 2^126 times the scale gives the
values, both of a pair in one instruction; scale bytes above 128 take two, since that factor would leave BF16's range.

    place in memory  8q + 4h + i  ->  place in the sum  8i + 2q + h      q word 0..3, h half 0..1, i register 0..3

A pair's magnitudes must come to bits 8 to 6 of each half and its signs to bit 15. The first pair lies there and takes
one mask, the second is moved as a whole, the signs of the other two lie apart from their magnitudes: five moves and six
masks a word. Four pairs that each move as a whole do not fit into a word: no four translates of {6, 7, 8, 15} cover 16
bits. `python -m megamoe.kernels.ahead` counts what a weight takes in the loop of a product.
"""

# K the summed dimension, G = K / 32 blocks of it

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(exponents, OPERAND: tl.constexpr):
    """Exponent bytes, int32 of any shape, as bfloat16 or float32.    127 -> 1.0    0 -> 0.0    255 -> infinity"""
    bits = exponents << 23
    if tl.bfloat16 == OPERAND:
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505  Triton compiles what follows a return
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def half_of(pairs, HIGH: tl.constexpr, OPERAND: tl.constexpr):
    """The lower or the higher BF16 of each int32 of pairs.    0x3F804000 -> 2.0, HIGH 1.0"""
    if tl.bfloat16 == OPERAND:
        return (pairs >> (16 if HIGH else 0)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505
        return ((pairs if HIGH else pairs << 16) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def codes_in_pair(words, REGISTER: tl.constexpr):
    """Codes REGISTER and REGISTER + 4 of each prepacked word as a pair of BF16, 2^-126 of their values.

    A code's sign becomes bit 15, the other three bits 8 to 6, the exponent's last two and the mantissa's first.
        word 0x000100C0, REGISTER 0: code 3 (1.5)  ->  0x000000C0;  REGISTER 2: code 6 has magnitude 1  ->  0x00400000
    """
    if REGISTER == 0:
        return words & -0x7E3F7E40  # 0x81C081C0
    elif REGISTER == 1:  # noqa: RET505
        return (words << 3) & -0x7E3F7E40
    elif REGISTER == 2:
        return ((words << 6) & 0x01C001C0) | ((words << 2) & -0x7FFF8000)
    else:
        return ((words >> 3) & 0x01C001C0) | ((words << 1) & -0x7FFF8000)


@triton.jit
def multiply_pairs(pairs, factors):
    """Pairs of BF16 in int32 times pairs of factors, in one instruction; Triton has none for it (3.9)."""
    return tl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [pairs, factors], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def bytes_of(words):
    """[N, G] int32 -> [N, 4 G] int32: the bytes of each word, the lowest first.    0x04030201 -> 1 2 3 4"""
    first = tl.join(words & 255, (words >> 16) & 255)
    second = tl.join((words >> 8) & 255, (words >> 24) & 255)
    return tl.reshape(tl.join(first, second), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def decode_e2m1(words, exponents, OPERAND: tl.constexpr, SMALL_SCALES: tl.constexpr):
    """words [N, K / 8] int32, exponents [N, G] int32 -> [N, K] bfloat16 or float32 in the order of the sum.

    a word 0x40 with exponent 128: code 0 is 1 (0.5), times 2  ->  1.0 in the first place, zeros in the others
    """
    N: tl.constexpr = words.shape[0]
    G: tl.constexpr = exponents.shape[1]
    first = tl.join(codes_in_pair(words, 0), codes_in_pair(words, 1))
    last = tl.join(codes_in_pair(words, 2), codes_in_pair(words, 3))
    pairs = tl.permute(tl.reshape(tl.join(first, last), (N, G, 4, 2, 2)), (0, 1, 4, 3, 2))  # block, register, word
    pairs = tl.reshape(pairs, (N, G, 16))
    if SMALL_SCALES and tl.bfloat16 == OPERAND:
        factors = exponents * 0x00800080 + 126 * 0x00800080  # of a pair: exponent byte + 126, twice
        pairs = multiply_pairs(pairs, tl.broadcast_to(factors[:, :, None], (N, G, 16)))
    values = tl.reshape(tl.join(half_of(pairs, False, OPERAND), half_of(pairs, True, OPERAND)), (N, G, 32))
    if not SMALL_SCALES:
        values = values * 8.507059173023462e37 * power_of_two(exponents, OPERAND)[:, :, None]
    elif tl.float32 == OPERAND:
        values = values * power_of_two(exponents + 126, OPERAND)[:, :, None]
    return tl.reshape(values, (N, G * 32))
