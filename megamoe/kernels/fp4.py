"""Decoding weights for chips whose matrix units know neither E2M1 nor scales: to BF16, exactly, as costs least.

A word holds eight E2M1 codes. Moved by a few bits and masked, two of them, four apart, are two BF16 numbers of 2^-126
of their values (0.5 is a subnormal then, which BF16 products keep), and lie as a register of the matrix instruction has
two neighbours of K. So each 32 of K are summed in another order than they have in memory, into which x is put when it
is widened (`layout.Wide`). Compiled for SM90, the loop of a tile of 16 rows is 4.3 instructions a weight, where
`tl.dot_scaled`, which looks the codes up, has 6.4; memory delivers a weight in 5 of them (Triton 3.9; not timed).

    place in memory  8q + 4h + i  ->  place in the sum  8i + 2q + h      q word 0..3, h half 0..1, i register 0..3
"""

# K the summed dimension, G = K / 32 blocks of it

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(exponents, OPERAND: tl.constexpr):
    """Scale bytes of any shape as bfloat16 or float32.    127 -> 1.0    130 -> 8.0    0 -> 0.0    255 -> infinity"""
    bits = exponents.to(tl.int32) << 23
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
    """Codes REGISTER and REGISTER + 4 of each word as a pair of BF16, 2^-126 of their values.

    A code's sign becomes bit 15, the other three bits 8 to 6, the exponent's last two and the mantissa's first.
        word 0x00030001, REGISTER 0: codes 1 (0.5) and 3 (1.5), the latter code 4  ->  0x00C00040
    """
    if REGISTER == 0:
        magnitudes, signs = words << 6, words << 12
    elif REGISTER == 1:
        magnitudes, signs = words << 2, words << 8
    elif REGISTER == 2:
        magnitudes, signs = words >> 2, words << 4
    else:
        magnitudes, signs = words >> 6, words
    return (magnitudes & 0x01C001C0) | (signs & -0x7FFF8000)


@triton.jit
def decode_e2m1(words, exponents, OPERAND: tl.constexpr):
    """words [N, K / 8] int32, exponents [N, G] uint8 -> [N, K] bfloat16 or float32 in the order of the sum.

    a word 0x0...01 with exponent 128: code 1 is 0.5, times 2  ->  1.0 in the first place, zeros in the others
    """
    N: tl.constexpr = words.shape[0]
    G: tl.constexpr = exponents.shape[1]
    first = tl.join(codes_in_pair(words, 0), codes_in_pair(words, 1))
    last = tl.join(codes_in_pair(words, 2), codes_in_pair(words, 3))
    pairs = tl.permute(tl.reshape(tl.join(first, last), (N, G, 4, 2, 2)), (0, 1, 4, 3, 2))  # block, register, word
    pairs = tl.reshape(pairs, (N, G, 16))
    values = tl.reshape(tl.join(half_of(pairs, False, OPERAND), half_of(pairs, True, OPERAND)), (N, G, 32))
    # two products: 2^126 and a scale above 2 in one would leave the range
    values = values * 8.507059173023462e37 * power_of_two(exponents, OPERAND)[:, :, None]
    return tl.reshape(values, (N, G * 32))
