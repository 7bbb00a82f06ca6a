"""The CPU's kernels, every path that this CPU runs: the order of the sum to the bit, and torch's bodies beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from unittest import mock

import pytest
import torch
from torch import Tensor

from megamoe.activations import Activation
from megamoe.execution.ops import activate, add_bias, reduce_slots
from megamoe.formats import (
    MXFP4,
    MXFP8,
    dequantize_mxfp4,
    dequantize_mxfp8,
    e8m0_to_float,
    quantize_mxfp4,
    quantize_mxfp8,
    unpack_e2m1,
)
from megamoe.kernels.cpu import build as building
from megamoe.kernels.cpu import library as library_of_paths
from megamoe.kernels.cpu import paths
from megamoe.kernels.cpu.build import BuildError, build
from megamoe.kernels.cpu.layout import pack_bf16, pack_mxfp4, unpack_bf16, unpack_mxfp4
from megamoe.kernels.cpu.library import (
    Library,
    Rows,
    find_fault,
    load,
    product_of,
    sum_in_order,
    sum_in_tiles,
    using,
)
from megamoe.kernels.cpu.paths import PATHS, Path, runnable
from megamoe.kernels.gating import tables_of
from megamoe.reference import round_mxfp8
from tests.cases import ACTIVATIONS

# BF16 instructions written out, so that what surrounds them is tested where the CPU does not have them; -O2, with
# which the compiler is done in half the time
WRITTEN_OUT = Path("portable-bf16", "bf16-dot", ("-O2", "-DMEGAMOE_BF16_DOT"))
TILES_WRITTEN_OUT = Path("portable-tiles", "bf16-tile", products="tiles.cpp", order="words")
HERE = runnable()
# tuned for other CPUs than this one, and run here all the same
TUNED_OTHERWISE = [
    replace(path, flags=flags)
    for path in PATHS
    for flags in (path.flags, path.flags + tuple(flag for _, flag in path.tuned))
    if path.name in {each.name for each in HERE} and flags not in {each.flags for each in HERE}
]
TESTED = [*HERE, *TUNED_OTHERWISE, WRITTEN_OUT, TILES_WRITTEN_OUT]
FUSED = [path for path in TESTED if path.arithmetic == "fma"]
TILED = [path for path in TESTED if path.arithmetic == "bf16-tile"]
ROOT = FilePath(__file__).parents[1]
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31, 32, 33, 64, 192, 193, 257)
THREADS = (1, 2, 3, 4)
SIZES = [(64, 96), (33, 32), (3, 50), (9, 57), (72, 100), (256, 192), (40, 2880), (24, 7168)]  # N outputs, K inputs


BUILD = """
import os
import signal
os.nice(15)
from megamoe.kernels.cpu.build import build
from tests.test_cpu_kernels import PATHS, TESTED
for path in (*TESTED, *PATHS):
    build(path)
"""


def beside(_: FilePath) -> None:
    """Begun with the session: a test finds its path built, and builds what is not. Compilers wait for each other."""
    subprocess.run([sys.executable, "-c", BUILD], cwd=ROOT, capture_output=True, timeout=600, check=False)


def ids(path: Path) -> str:
    return path.name + "-tuned-otherwise" * (path in TUNED_OTHERWISE)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wide(*shape: int, seed: int = 0) -> Tensor:
    """Values of both signs over 40 powers of two."""
    powers = torch.randint(-20, 20, shape, generator=torch.Generator().manual_seed(seed + 1))
    return randn(*shape, seed=seed) * torch.exp2(powers.float())


def cancelling(n: int, k: int) -> tuple[Tensor, Tensor]:
    """x [257, K] and weight [N, K] whose products sum to zero but for rounding.

    What is left is the rounding of the sum, so another order of it shows in BF16 too, where ordinary numbers hide it.
    """
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3))
    a, b, rest = randn(257, k // 2), randn(n, k // 2, seed=1) * 2.0 ** (torch.arange(k // 2) % 12), k % 2
    x, weight = torch.cat((a, a, torch.zeros(257, rest)), 1), torch.cat((b, -b, torch.zeros(n, rest)), 1)
    return x[:, order].to(torch.bfloat16), weight[:, order].to(torch.bfloat16)


def product(library: Library, x: Tensor, weight: MXFP4 | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full((len(x), weight.shape[0]), torch.nan, dtype=dtype)
    product_of(library, x, weight, out)
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


# ---- the order of the sum ----


@pytest.mark.parametrize("path", FUSED, ids=ids)
@pytest.mark.parametrize(("n", "k"), [(64, 96), (33, 32), (40, 192), (8, 1024)])
def test_mxfp4_products_are_sums_of_fused_steps_in_order(path: Path, n: int, k: int) -> None:
    for x, weight in ((wide(21, k).to(torch.bfloat16), wide(n, k, seed=5)), cancelling(n, k)):
        x, quantized = x[:21], quantize_mxfp4(weight)
        expected = sum_in_order(x, E2M1[unpack_e2m1(quantized.packed).long()], e8m0_to_float(quantized.scales))
        assert same_bits(product(load(path), x, quantized), expected)
        assert same_bits(product(load(path), x, quantized, torch.bfloat16), expected.to(torch.bfloat16))


@pytest.mark.parametrize("path", FUSED, ids=ids)
@pytest.mark.parametrize(("n", "k"), [(64, 96), (33, 32), (3, 50), (9, 57), (40, 192)])
def test_bf16_products_are_sums_of_fused_steps_in_order(path: Path, n: int, k: int) -> None:
    for x, weight in ((wide(21, k), wide(n, k, seed=5)), cancelling(n, k)):
        x, weight = x[:21].to(torch.bfloat16), weight.to(torch.bfloat16)
        expected = sum_in_order(x, weight)
        assert same_bits(product(load(path), x, weight), expected)
        assert same_bits(product(load(path), x, weight, torch.bfloat16), expected.to(torch.bfloat16))


def test_the_order_in_torch_is_that_of_single_fused_steps() -> None:
    from math import fsum  # one rounding of exact terms to FP64, then to FP32: innocuous, as sum_in_order() explains

    x, weight = wide(1, 40).to(torch.bfloat16), wide(1, 40, seed=3).to(torch.bfloat16)
    total = 0.0
    for start in (0, 32):
        part = 0.0
        for k in range(start, min(start + 32, 40)):
            part = float(torch.tensor(fsum((float(x[0, k]) * float(weight[0, k]), part)), dtype=torch.float32))
        total = float(torch.tensor(fsum((part, total)), dtype=torch.float32))
    assert float(sum_in_order(x, weight)) == total
    assert not same_bits(sum_in_order(x.flip(1), weight.flip(1)), sum_in_order(x, weight)), "another order would show"


# ---- the order of the sum in tiles ----


def tiny(*shape: int, seed: int = 0) -> Tensor:
    """Values whose products lie about 2^-126, some of them subnormal themselves."""
    powers = torch.randint(-74, -54, shape, generator=torch.Generator().manual_seed(seed + 1)).float()
    powers[..., ::7] = -130.0
    powers[..., ::5] = 1.0
    return randn(*shape, seed=seed) * torch.exp2(powers)


@pytest.mark.parametrize("path", TILED, ids=ids)
@pytest.mark.parametrize(("n", "k"), [(64, 96), (33, 32), (3, 50), (9, 57), (40, 192), (8, 2880)])
@pytest.mark.parametrize("num_rows", [1, 21, 37])
def test_bf16_products_in_tiles_are_two_fused_chains_for_each_32_of_k(
    path: Path, n: int, k: int, num_rows: int
) -> None:
    for x, weight in ((wide(37, k), wide(n, k, seed=5)), cancelling(n, k), (tiny(37, k), tiny(n, k, seed=7))):
        x, weight = x[:num_rows].to(torch.bfloat16), weight.to(torch.bfloat16)
        expected = sum_in_tiles(x, weight)
        assert expected.any()
        assert same_bits(product(load(path), x, weight), expected)
        assert same_bits(product(load(path), x, weight, torch.bfloat16), expected.to(torch.bfloat16))


@pytest.mark.parametrize("path", TILED, ids=ids)
@pytest.mark.parametrize(("n", "k"), [(64, 96), (33, 32), (40, 192), (300, 2240)])
def test_mxfp4_products_in_tiles_are_those_of_its_bf16_values(path: Path, n: int, k: int) -> None:
    for x, weight in ((wide(37, k), wide(n, k, seed=5)), cancelling(n, k), (tiny(37, k), tiny(n, k, seed=7))):
        x, quantized = x[:37].to(torch.bfloat16), quantize_mxfp4(weight)
        assert (quantized.scales > 0).all()
        dense = dequantize_mxfp4(quantized)
        expected = product(load(path), x, dense)
        for num_rows in (1, 16, 37):
            assert same_bits(product(load(path), x[:num_rows], quantized), expected[:num_rows])
        if k < 200:
            assert same_bits(expected, sum_in_tiles(x, dense))


def test_the_order_in_tiles_in_torch_is_that_of_single_fused_steps() -> None:
    from math import fsum

    x, weight = randn(1, 40).to(torch.bfloat16), randn(1, 40, seed=3).to(torch.bfloat16)

    def rounded(*terms: float) -> float:
        return float(torch.tensor(fsum(terms), dtype=torch.float32))

    total = 0.0
    for start in (0, 32):
        chains = [0.0, 0.0]
        for k in range(start, min(start + 32, 40)):
            chains[k % 2] = rounded(float(x[0, k]) * float(weight[0, k]), chains[k % 2])
        total = rounded(total, rounded(*chains))
    assert float(sum_in_tiles(x, weight)) == total
    assert not same_bits(sum_in_tiles(x, weight), sum_in_order(x, weight)), "the other order would show"


def test_a_result_in_tiles_is_small_by_what_it_rounds_to() -> None:
    weight = torch.tensor([[2.0**-60, 0.0, -(2.0**-75)]], dtype=torch.bfloat16)
    # 2^-126 less half a unit of the last place below it, which rounds to 2^-126, and less two units
    for less, expected in ((2.0**-76, 2.0**-126), (2.0**-74, 0.0)):
        x = torch.tensor([[2.0**-66, 0.0, less]], dtype=torch.bfloat16)
        assert float(sum_in_tiles(x, weight)) == expected
        for path in TILED:
            assert float(product(load(path), x, weight)) == expected


@pytest.mark.parametrize("path", TILED, ids=ids)
def test_more_rows_and_outputs_than_a_panel_has_give_the_same_bits(path: Path) -> None:
    num_rows, n, k = (1100, 600, 2112) if path.flags else (530, 64, 64)
    x, weight = randn(num_rows, k).to(torch.bfloat16), randn(n, k, seed=1)
    library, some = load(path), [0, 31, 255, 256, 257, 512, num_rows - 1]
    for held in (quantize_mxfp4(weight), weight.to(torch.bfloat16)):
        whole = product(library, x, held)
        assert same_bits(product(library, x[some], held), whole[some])
        assert same_bits(product(library, x, held, torch.bfloat16), whole.to(torch.bfloat16))


@pytest.mark.parametrize("path", TILED, ids=ids)
@pytest.mark.parametrize(("n", "first"), [(1024, 0), (1024, 8), (1000, 0)])
def test_outputs_that_no_cache_could_keep_go_where_they_are_told(path: Path, n: int, first: int) -> None:
    num_rows, k = (1100, 64) if path.flags else (70, 64)  # written out, tiles take their time
    x, weight = randn(num_rows, k).to(torch.bfloat16), randn(n, k, seed=1).to(torch.bfloat16)
    x[3, 5], x[40, 6], x[69, 0] = torch.nan, torch.inf, -torch.inf
    x[41, 8:10] = torch.inf  # less each other they are a NaN of another sign
    library, goes = load(path), torch.randperm(num_rows, generator=torch.Generator().manual_seed(2))
    memory = torch.full((num_rows + 2, n + 32), 7.0, dtype=torch.bfloat16)
    out = memory[1 : num_rows + 1, first : first + n]
    counts = torch.tensor([num_rows])
    library.products(Rows(x, counts), pack_bf16(weight)[None], n, out, goes)
    written, expected = out[goes].contiguous(), product(library, x, weight).to(torch.bfloat16)
    assert same_bits(written.nan_to_num(), expected.nan_to_num())
    assert (written.view(torch.int16)[written.isnan()] == 0x7FC0).all()
    assert torch.equal(written.isnan(), expected.isnan())
    out.fill_(7.0)
    assert (memory == 7.0).all(), "nothing beside the outputs is written"


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("amx_bf16"), reason="torch does not use tiles here")
def test_tiles_are_left_as_torch_finds_them() -> None:
    x, weight = randn(64, 256).to(torch.bfloat16), randn(64, 256, seed=1).to(torch.bfloat16)
    before = torch.mm(x, weight.t())
    ours = product(load(runnable()[0]), x, weight)
    for rows in (3, 40, 64):
        assert same_bits(product(load(runnable()[0]), x[:rows], weight), ours[:rows])
        assert same_bits(torch.mm(x, weight.t()), before)


# ---- what no path may change ----


@pytest.mark.parametrize("path", TESTED, ids=ids)
@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "bf16"])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_row_has_the_same_bits_for_any_number_of_rows_place_and_threads(
    path: Path, packed: bool, n: int, k: int
) -> None:
    if packed and k % 32:
        pytest.skip("MXFP4 has blocks of 32")
    x, weight = cancelling(n, k)
    library, held = load(path), quantize_mxfp4(weight) if packed else weight
    expected = product(library, x, held)
    assert packed or expected.count_nonzero() > expected.numel() / 4
    order = torch.randperm(257, generator=torch.Generator().manual_seed(2))
    for threads in THREADS:
        torch.set_num_threads(threads)
        for num_rows in ROWS if "portable" not in path.name or k < 150 else (1, 5, 193):
            assert same_bits(product(library, x[:num_rows], held), expected[:num_rows]), (threads, num_rows)
            moved = order[:num_rows]
            assert same_bits(product(library, x[moved], held), expected[moved]), (threads, num_rows)


@pytest.mark.parametrize("path", TESTED, ids=ids)
def test_rows_go_where_they_are_told_by_their_experts(path: Path) -> None:
    library, experts, k, n = load(path), 5, 64, 72
    weights = [quantize_mxfp4(randn(n, k, seed=seed)) for seed in range(experts)]
    packed = [pack_mxfp4(weight, path.order) for weight in weights]
    held = torch.stack([each for each, _ in packed]), torch.stack([each for _, each in packed])
    counts = torch.tensor([3, 0, 9, 1, 200])
    x = randn(50, k + 16).to(torch.bfloat16)[:, 3 : 3 + k]  # cut from wider rows, at an odd place
    rng = torch.Generator().manual_seed(4)
    source, goes = torch.randint(0, 50, (213,), generator=rng), torch.randperm(213, generator=rng)
    out = torch.zeros(215, 2 * n, dtype=torch.bfloat16)
    library.products(Rows(x, counts, source), held, n, out[:, 5 : 5 + n], goes)
    of = torch.arange(experts).repeat_interleave(counts)
    for row in range(213):
        expected = product(library, x[source[row]][None].contiguous(), weights[int(of[row])], torch.bfloat16)[0]
        assert same_bits(out[goes[row], 5 : 5 + n], expected)
    assert not out[213:].any()
    assert not out[:, :5].any()
    assert not out[:, 5 + n :].any()


@pytest.mark.parametrize("path", TESTED, ids=ids)
@pytest.mark.parametrize("beside", [0.0, 3e38, float("inf"), float("nan")])
def test_a_row_does_not_see_the_values_beside_it(path: Path, beside: float) -> None:
    x, weight = randn(33, 160).to(torch.bfloat16), randn(48, 160, seed=1).to(torch.bfloat16)
    expected = product(load(path), x, weight)[5]
    x[:5], x[6:] = beside, beside
    assert same_bits(product(load(path), x, weight)[5], expected)


@pytest.mark.parametrize("path", TESTED, ids=ids)
@pytest.mark.parametrize("num_rows", [1, 40], ids=["few", "many"])
def test_sums_are_rounded_once_also_where_they_are_subnormal_or_no_numbers(path: Path, num_rows: int) -> None:
    """Groups of 32 whose sums are normal leave 2^-127 between them; BF16 instructions take it for zero."""
    x, weight = randn(num_rows, 64).to(torch.bfloat16), torch.zeros(72, 64)
    weight[:, 0], weight[:, 32] = 1.5 * 2.0**-63, -(2.0**-63)
    weight[3, 5], weight[40, 6], weight[70] = torch.inf, torch.nan, randn(64)
    x[0], x[-1, 7] = 2.0**-63, 3e38
    sums = product(load(path), x, weight.to(torch.bfloat16))
    got, expected = product(load(path), x, weight.to(torch.bfloat16), torch.bfloat16), sums.to(torch.bfloat16)
    assert path in TILED or sums[0, 0] == 2.0**-127
    assert expected.isnan().any()
    assert torch.equal(got.isnan(), expected.isnan())
    assert same_bits(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("path", FUSED, ids=ids)
def test_subnormals_are_kept_whatever_the_caller_asked_of_its_thread(path: Path) -> None:
    x = (randn(40, 64) * 2.0**-100).to(torch.bfloat16)
    weight = (randn(40, 64, seed=1) * 2.0**-36).to(torch.bfloat16)
    tokens = (randn(40, 64, seed=2) * 1e-39).to(torch.bfloat16)
    expected = sum_in_order(x, weight)
    assert expected.abs().max() < 2.0**-126
    assert expected.any()
    torch.set_flush_denormal(True)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            got, rounded = product(load(path), x, weight), torch.empty_like(tokens)
            load(path).round(tokens, rounded)
            reduced = torch.empty_like(tokens)
            load(path).reduce_slots(tokens, torch.arange(40).view(40, 1), reduced)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(got, expected)
    assert same_bits(rounded, round_mxfp8(tokens))
    assert same_bits(reduced, tokens + 0.0)  # a sum that starts from zero is never -0
    assert reduced.any()


@pytest.mark.parametrize("path", TESTED, ids=ids)
@pytest.mark.parametrize("scale", [0, 1, 50, 78, 79, 80, 127, 174, 175, 176, 220, 254])
def test_many_rows_have_the_bits_of_one_whatever_the_powers_of_rows_and_scales(path: Path, scale: int) -> None:
    """Of many rows scales may be multiplied into the weights, where that rounds nothing: never of a single one."""
    library, n, k = load(path), 33, 128
    rows, weight = cancelling(n, k)
    packed = quantize_mxfp4(weight.float())
    some = torch.rand(packed.scales.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    packed = MXFP4(packed.packed, torch.where(some, scale, packed.scales))
    for power in (0.0, -133.0, -118.0, -73.0, -66.0, -63.0, 60.0, 63.0, 100.0, 124.0):
        x = rows[:37].clone()  # more than are few for any path
        x[7] = (x[7].float() * 2.0**power).to(torch.bfloat16)
        x[8, ::3] = 0.0
        x[9, 4] = (x[9, 4].float() * 2.0**power).to(torch.bfloat16)
        alone = torch.cat([product(library, row[None], packed) for row in x])
        assert same_bits(product(library, x, packed), alone), power


@pytest.mark.parametrize("path", [path for path in TESTED if path not in TILED], ids=ids)
@pytest.mark.parametrize("at", [2, 300, 574])
def test_values_that_scales_must_not_be_folded_for_are_seen_wherever_they_lie_in_a_row(path: Path, at: int) -> None:
    """Rows are looked at in parts of 256 values, as they are laid out. Two products cancel; times their scale neither
    is a number of FP32."""
    library, (rows, weight) = load(path), cancelling(33, 576)
    weight[:, at // 32 * 32 : at // 32 * 32 + 32] = 1.0
    packed = quantize_mxfp4(weight.float())
    packed = MXFP4(packed.packed, torch.full_like(packed.scales, 174))
    x = rows[:37].clone()
    x[9] = 0.0
    x[9, at], x[9, at + 1] = 2.0**100, -(2.0**100)
    alone = torch.cat([product(library, row[None], packed) for row in x])
    assert not alone[9].any()
    assert same_bits(product(library, x, packed), alone)


@pytest.mark.parametrize("path", TESTED, ids=ids)
def test_every_code_and_scale_of_mxfp4_is_multiplied_by(path: Path) -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(253, 2)  # [253, 32], a row for each scale byte
    scales = torch.arange(253, dtype=torch.uint8).view(253, 1)
    weight = MXFP4(codes[:, 0::2] | (codes[:, 1::2] << 4), scales)
    exact = dequantize_mxfp4(weight, torch.float64)
    for k in range(16):
        x = torch.zeros(1, 32, dtype=torch.bfloat16)
        x[0, k] = 1.0
        got, expected = product(load(path), x, weight)[0], exact[:, k] + 0.0  # a sum that starts from zero is never -0
        if path.arithmetic == "bf16-tile":  # what is subnormal counts as zero, the least scale too
            expected = torch.where((expected.abs() < 2.0**-126) | (scales[:, 0] == 0), 0.0, expected)
        assert torch.equal(got.double(), expected), k


# ---- how weights are held ----


@pytest.mark.parametrize(("n", "k"), [(32, 32), (64, 96), (33, 64), (5, 160), (192, 128)])
def test_weights_come_back_as_they_were(n: int, k: int) -> None:
    weights = [quantize_mxfp4(randn(n, k, seed=seed)) for seed in range(3)]
    for order in ("bytes", "words"):
        packed, scales = (torch.stack(each) for each in zip(*(pack_mxfp4(w, order) for w in weights), strict=True))
        back = unpack_mxfp4(packed, scales, n, order)
        assert torch.equal(back.packed, torch.stack([weight.packed for weight in weights]))
        assert torch.equal(back.scales, torch.stack([weight.scales for weight in weights]))
    for width in (k, k - 3):
        dense = [randn(n, width, seed=seed).to(torch.bfloat16) for seed in range(3)]
        assert torch.equal(unpack_bf16(torch.stack([pack_bf16(each) for each in dense]), n, width), torch.stack(dense))


# ---- what surrounds the products ----


def awkward(rows: int, width: int) -> Tensor:
    """BF16 over the whole range, with zeros, subnormals and, in a few blocks, values that are not finite."""
    x = wide(rows, width).to(torch.bfloat16)
    x[1] = (randn(width) * 1e-40).to(torch.bfloat16)
    x[2, 3], x[3, 40], x[4, 70] = torch.nan, torch.inf, -torch.inf
    x[5], x[6, :32], x[7, 5] = 0.0, -0.0, 3.3e38
    return x


@pytest.mark.parametrize("path", TESTED, ids=ids)
def test_mxfp8_is_rounded_to_and_read_as_torch_does(path: Path) -> None:
    library = load(path)
    everything = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(2048, 32)
    for x in (awkward(64, 96), everything, randn(3000, 64).to(torch.bfloat16)):
        expected = quantize_mxfp8(x)
        rows = torch.zeros(len(x), x.shape[1] + x.shape[1] // 32 + 5, dtype=torch.uint8)  # as a row of the wire
        got = MXFP8(rows[:, : x.shape[1]].view(torch.float8_e4m3fn), rows[:, x.shape[1] : -5])
        library.quantize(x, got)
        assert torch.equal(got.scales, expected.scales)
        values, numbers = expected.values.view(torch.uint8), ~expected.values.float().isnan()
        assert torch.equal(got.values.view(torch.uint8)[numbers], values[numbers])
        assert torch.equal(got.values.float().isnan(), ~numbers)
        assert not rows[:, -5:].any()
        back, rounded, dense = torch.empty_like(x), torch.empty_like(x), dequantize_mxfp8(expected)
        library.dequantize(got, back)
        library.round(x, rounded)
        for each in (back, rounded):
            assert torch.equal(each.isnan(), dense.isnan())
            assert torch.equal(each[~dense.isnan()].view(torch.int16), dense[~dense.isnan()].view(torch.int16))


@pytest.mark.parametrize("path", TESTED, ids=ids)
def test_every_code_and_scale_of_mxfp8_is_read_as_torch_does(path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 8)
    q, got = MXFP8(codes.view(torch.float8_e4m3fn), scales), torch.empty(256, 256, dtype=torch.bfloat16)
    load(path).dequantize(q, got)
    expected = dequantize_mxfp8(q, torch.float32).to(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()].view(torch.int16), expected[~got.isnan()].view(torch.int16))


@pytest.mark.parametrize("path", TESTED, ids=ids)
@pytest.mark.parametrize("quantized", [True, False], ids=["mxfp8", "bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_the_activation_is_torchs_to_the_bit(path: Path, quantized: bool, activation: Activation) -> None:
    tables = tables_of(activation, torch.device("cpu"))
    for num_rows, width in ((0, 64), (1, 64), (700, 96), (5, 50)):
        if quantized and width % 32:
            continue
        gate_up = (wide(num_rows, activation.rows_per_output * width) * 3).to(torch.bfloat16)
        if num_rows > 4:
            gate_up[1, 3], gate_up[2, -47], gate_up[3, 40] = torch.nan, torch.nan, torch.inf
        weights = randn(num_rows, seed=1)
        with using(None):
            expected = activate(gate_up, weights, tables, quantized=quantized)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with using(path):
                got = activate(gate_up, weights, tables, quantized=quantized)
            assert torch.equal(got.isnan(), expected.isnan())
            numbers = ~expected.isnan()
            assert torch.equal(got[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize("path", TESTED, ids=ids)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_a_bias_is_added_as_torch_adds_it_to_the_bit(path: Path, weighted: bool) -> None:
    for counts, width in (([3, 0, 40, 1, 0], 50), ([0, 700], 96), ([0, 0], 8), ([1], 1)):
        num_rows = sum(counts)
        sums, bias = wide(num_rows, width), randn(len(counts), width, seed=1)
        weights = randn(num_rows, seed=2) if weighted else None
        goes = torch.randperm(num_rows, generator=torch.Generator().manual_seed(3)) if weighted else None
        given = sums, bias, torch.tensor(counts)
        with using(None):
            expected = torch.zeros(num_rows, width + 3, dtype=torch.bfloat16)
            add_bias(*given, expected[:, :width], weights=weights, goes=goes)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got = torch.zeros_like(expected)
            with using(path):
                add_bias(*given, got[:, :width], weights=weights, goes=goes)
            assert same_bits(got, expected)


@pytest.mark.parametrize("path", TESTED, ids=ids)
@pytest.mark.parametrize(("tokens", "topk", "width"), [(0, 2, 64), (1, 1, 5), (40, 8, 1030), (300, 3, 96)])
def test_the_sum_of_slots_is_torchs_to_the_bit(path: Path, tokens: int, topk: int, width: int) -> None:
    rows = wide(tokens * topk + 1, width).to(torch.bfloat16)
    rows[-1] = 0
    positions = torch.randperm(tokens * topk, generator=torch.Generator().manual_seed(1)).view(tokens, topk)
    if tokens > 1:
        positions[0], positions[1, 0] = tokens * topk, tokens * topk  # masked slots
    with using(None):
        expected = reduce_slots(rows, positions)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with using(path):
            assert same_bits(reduce_slots(rows, positions), expected)


@pytest.mark.parametrize("path", TESTED, ids=ids)
def test_every_code_and_scale_of_mxfp8_is_summed_as_torch_does(path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(257, 1)
    scales = torch.arange(257).clamp(max=127).to(torch.uint8).view(257, 1).repeat(1, 8)
    scales[:256, 4:] = torch.arange(256, dtype=torch.uint8).view(256, 1)  # the last row beside each
    rows = MXFP8(codes.view(torch.float8_e4m3fn), scales)
    positions = torch.stack((torch.arange(256), torch.full((256,), 256)), 1)
    with using(None):
        expected = reduce_slots(rows, positions)
    with using(path):
        got = reduce_slots(rows, positions)
    assert torch.equal(got.isnan(), expected.isnan())
    assert same_bits(got.nan_to_num(), expected.nan_to_num())


# ---- how a library gets there ----


def test_every_path_can_be_built_where_its_flags_are_known() -> None:
    paths = PATHS if torch.cpu.get_capabilities().get("architecture") == "x86_64" else runnable()
    for path in paths:
        assert build(path).exists()


TWO_AT_ONCE = """
import sys
from megamoe.kernels.cpu.build import build
from megamoe.kernels.cpu.paths import Path
notes = []
print(build(Path("tiny", "fma", ("-O0",)), notes.append), len(notes))
"""


def test_a_path_that_this_cpu_does_not_run_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_of_paths, "build", lambda *_: pytest.fail("built"))
    with pytest.raises(BuildError, match="it needs sve9"):
        load(Path("strange", "fma", needs=("sve9",)))
    monkeypatch.setattr(paths, "may_use_tiles", lambda: False)
    for path in PATHS:
        if "amx_tile" in path.needs:
            assert path not in runnable()
            with pytest.raises(BuildError, match="amx_tile"):
                load(Path("tiles", path.arithmetic, needs=path.needs))


# what it would compile is left out of every source: that a build is whole, test_every_path_can_be_built shows
EMPTIED = """#!/bin/bash
given=()
for each in "$@"; do [[ $each == *.cpp ]] && given+=(-x c++ /dev/null) || given+=("$each"); done
exec c++ "${given[@]}"
"""


def test_ranks_that_start_at_once_compile_once(tmp_path: FilePath) -> None:
    compiler = tmp_path / "emptied-c++"
    compiler.write_text(EMPTIED)
    compiler.chmod(0o700)
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": str(compiler)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", TWO_AT_ONCE], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [rank.communicate(timeout=200)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert len({library for library, _ in said}) == 1
    assert sorted(notes for _, notes in said) == ["0", "1"]
    assert sorted(each.suffix for each in (tmp_path / "megamoe").iterdir()) == [".lock", ".so"]


KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
from megamoe.kernels.cpu import build as building
from megamoe.kernels.cpu.paths import PATHS
subprocess.run = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
building.build(PATHS[-1])
"""


def test_what_a_killed_builder_left_goes_with_the_next_build_and_no_living_ones(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", KILLED], env=environment, timeout=100, check=False)
    assert killed.returncode == -signal.SIGKILL
    cache, here = tmp_path / "megamoe", building._here()
    (left,) = cache.glob(".building-*")
    assert left.name.startswith(f".building-{here}-")
    (left / "part.o").touch()
    now, old = time.time(), time.time() - building._FORGOTTEN_S - 60
    cases = {  # seconds since the epoch when it was last written to, and whether it stays
        f".building-{here}-{os.getpid()}-living": (old, True),
        f".building-{here}-1-of_another_user": (old, True),
        ".building-000000000000-1-of_another_machine": (now, True),
        ".building-000000000000-1-left_there": (old, False),
        ".building-of_a_version_before": (old, False),
        ".building-of_a_version_before_now": (now, True),
    }
    for name, (written, _) in cases.items():
        (cache / name).mkdir()
        os.utime(cache / name, (written, written))
    monkeypatch.setattr(building, "_caches", lambda: (cache, cache))
    with pytest.raises(BuildError, match="-mno-such-thing"):
        build(Path("odd", "fma", ("-mno-such-thing",)))
    assert {each.name for each in cache.glob(".building-*")} == {name for name, (_, stays) in cases.items() if stays}


def test_a_builder_of_another_user_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "kill", mock.Mock(side_effect=PermissionError))
    assert building._lives(1)
    monkeypatch.setattr(os, "kill", mock.Mock(side_effect=ProcessLookupError))
    assert not building._lives(1)


def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_caches", lambda: (tmp_path, tmp_path))
    with pytest.raises(BuildError, match="-mno-such-thing"):
        build(Path("odd", "fma", ("-mno-such-thing",)))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler"):
        build(Path("none", "fma"))
    assert {each.suffix for each in tmp_path.iterdir()} == {".lock"}


def test_where_a_cache_is_read_only_its_libraries_are_taken_and_others_go_to_the_users_own(
    tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    kept, own = building._caches()
    assert kept == building._cache() == tmp_path / "kept" / "megamoe"
    path = Path("odd", "fma")
    library = kept / f"odd-{building._fingerprint(path)}.so"
    library.touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: place != kept and access(place, mode))
    assert build(path) == library
    assert building._cache() == building._cache() == own  # the same for the ranks, which are other processes
    assert own.stat().st_mode & 0o777 == 0o700
    library.rename(own / library.name)
    assert building.is_built(path)
    own.chmod(0o777)  # a folder in which others may put libraries
    assert not building.is_built(path)
    with pytest.raises(BuildError, match="set TORCH_EXTENSIONS_DIR"):
        building._cache()


def test_a_library_that_sums_in_another_order_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    library = load(runnable()[-1])
    assert find_fault(library) == ""
    right = library.products

    def by_company(rows: Rows, weights: object, outputs: int, out: Tensor, goes: Tensor | None = None) -> None:
        right(rows, weights, outputs, out, goes)  # type: ignore[arg-type]
        out += len(out) * 1e-6

    monkeypatch.setattr(library, "products", by_company)
    assert "other bits for 1 rows" in find_fault(library)
    monkeypatch.setattr(library, "products", lambda *given: given[3].fill_(1.0))
    assert "wrong" in find_fault(library)
