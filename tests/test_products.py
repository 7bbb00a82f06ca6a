"""Products as layers use them: by each path of the CPU's kernels and by torch, where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path as FilePath

import pytest
import torch
from torch import Tensor

from megamoe.execution import products
from megamoe.execution.products import ROW_BLOCKS, Held, linear, products_of, rows_at_once
from megamoe.execution.weights import Matrix
from megamoe.formats import WEIGHT_FORMATS, quantize_mxfp4
from megamoe.kernels.cpu.library import KernelWarning, Rows, using
from megamoe.kernels.cpu.paths import Path, runnable
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.reference import relative_error
from megamoe.shape import MoEShape
from tests.cases import Batch, make_batch, make_layer, make_weights, oracle, split
from tests.test_cpu_kernels import SIZES, WRITTEN_OUT, cancelling, randn, same_bits

WAYS = {**{path.name: path for path in runnable()}, "torch": None}
CPU = torch.device("cpu")


def by(way: str) -> AbstractContextManager[None]:
    return using(WAYS[way])


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- one matrix ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_linear_sums_in_float32_and_rounds_once(way: str, n: int, k: int) -> None:
    x, weight = randn(65, k).to(torch.bfloat16), (randn(n, k, seed=1) / k**0.5).to(torch.bfloat16)
    exact = x.double() @ weight.double().T
    with by(way):
        got, unrounded = linear(x, weight), linear(x, weight, dtype=torch.float32)
    assert (got.dtype, unrounded.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(got, exact) < 2**-8
    # a value that is not within rounding of the exact one was not summed in FP32
    assert (got.double() - exact).abs().le(exact.abs() * 2**-8 + 1e-4).all()
    assert relative_error(unrounded, exact) < 1e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("n", "k"), [(64, 96), (9, 57), (24, 2880)])
def test_linear_gives_the_bits_of_the_whole_for_any_part(way: str, n: int, k: int) -> None:
    x, weight = cancelling(n, k)
    with by(way), warnings.catch_warnings():
        warnings.simplefilter("error", KernelWarning)
        expected = linear(x, weight)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            whole = linear(x, weight)
            assert way == "torch" or same_bits(whole, expected), "threads matter to torch alone"
            for num_rows in (0, 1, 2, 7, 31, 33, 257):
                assert same_bits(linear(x[257 - num_rows :], weight), whole[257 - num_rows :])


@pytest.mark.parametrize("way", WAYS)
def test_products_of_small_integers_are_exact(way: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-3, 4, (rows, 64), generator=rng).to(torch.bfloat16) for rows in (9, 5))
    with by(way):
        assert torch.equal(linear(x, weight), (x.double() @ weight.double().T).to(torch.bfloat16))


# ---- several experts, and layers ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "bf16"])
def test_rows_of_several_experts_have_the_bits_of_one_matrix_after_another(way: str, packed: bool) -> None:
    counts, matrix = torch.tensor([3, 0, 40, 1]), Matrix("down", 72, 64, WEIGHT_FORMATS["mxfp4" if packed else "bf16"])
    weights = [randn(72, 64, seed=seed).to(torch.bfloat16) for seed in range(4)]
    given = [quantize_mxfp4(weight) if packed else weight for weight in weights]
    x, rng = randn(20, 64).to(torch.bfloat16), torch.Generator().manual_seed(1)
    source, goes = torch.randint(0, 20, (44,), generator=rng), torch.randperm(44, generator=rng)
    out = torch.zeros(44, 72, dtype=torch.bfloat16)
    with by(way):
        way_of = products_of(CPU)
        parts = [way_of.layout.pack(matrix, each) for each in given]
        stacks = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        for key, (shape, dtype) in way_of.layout.buffers(matrix).items():
            assert (tuple(stacks[key].shape[1:]), stacks[key].dtype) == (shape, dtype)
        way_of.multiply(Rows(x, counts, source), Held(matrix, stacks), out, goes)
        begin = 0
        for expert, count in enumerate(counts.tolist()):
            part = slice(begin, begin + count)
            assert same_bits(out[goes[part]], linear(x[source[part]], given[expert]))
            begin += count


def outputs_by_way(
    group: EPGroup, way: str, shape: MoEShape, batch: Batch, shares: list[slice], weight_format: str
) -> list[Tensor]:
    mine = batch.part(shares[group.rank])
    with by(way):
        made = [make_layer(shape, group, weight_format=weight_format, waves=waves) for waves in (1, 3)]
        return [layer(mine.hidden, mine.ids, mine.weights) for layer in made]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_by_every_way_the_output_is_the_oracles_for_any_ep_size(
    ranks: LocalRanks, way: str, weight_format: str, ep_size: int
) -> None:
    shape = MoEShape(hidden=192, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)
    batch = make_batch(shape, 61)
    shares = split(61, ep_size, empty=1 if ep_size > 1 else None)
    found = ranks.run(outputs_by_way, way, shape, batch, shares, weight_format, size=ep_size)
    with by(way):
        expected = oracle(shape, batch, weight_format, "mxfp8")
    for each in range(2):
        assert torch.equal(torch.cat([rank[each] for rank in found]), expected)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "portable"])
@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(192, 192), (2880, 192), (192, 2880), (7168, 96)])
def test_a_token_alone_has_the_bits_that_it_has_in_any_batch(
    way: str, weight_format: str, hidden: int, intermediate: int
) -> None:
    shape = MoEShape(hidden, intermediate, 2, 2)
    batch = make_batch(shape, 257, mask=False)
    with by(way):
        layer = make_layer(shape, weight_format=weight_format, dispatch_format="bf16")
        for threads in (1, 3) if way != "torch" else (1,):
            torch.set_num_threads(threads)
            whole = layer(batch.hidden, batch.ids, batch.weights)
            for num_tokens in (1, 2, 3, 5, 8, 129):
                part = batch.part(slice(0, num_tokens))
                assert same_bits(layer(part.hidden, part.ids, part.weights), whole[:num_tokens]), num_tokens


# ---- without a compiler ----

WITHOUT_COMPILER = """
import sys, warnings
import torch
from megamoe import MegaMoE, MoEShape
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    layer = MegaMoE(MoEShape(64, 32, 4, 2))
rng = torch.Generator().manual_seed(0)
layer.load_experts(torch.randn(4, 64, 64, generator=rng), torch.randn(4, 64, 32, generator=rng))
x = torch.randn(9, 64, generator=rng), torch.randint(0, 4, (9, 2), generator=rng), torch.rand(9, 2, generator=rng)
whole = layer(*x)
assert all(torch.equal(layer(*(each[i : i + 1] for each in x)), whole[i : i + 1]) for i in range(9))
print([f"{each.category.__name__}: {each.message}" for each in said])
"""


def test_without_a_compiler_torch_computes_and_a_warning_says_so(tmp_path: FilePath) -> None:
    hidden = {**os.environ, "CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=hidden, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "KernelWarning: experts are computed by torch, slower" in done.stdout
    assert "no-such-compiler" in done.stdout


def test_the_next_larger_block_is_taken_where_a_smaller_one_does_not_keep_the_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def keeps(*given: object) -> bool:
        size = given[-1]
        assert isinstance(size, int)
        tried.append(size)
        return size >= least

    monkeypatch.setattr(products, "keeps_bits", keeps)
    for least in (*ROW_BLOCKS, 10_000):
        rows_at_once.cache_clear()
        if least == 10_000:
            with pytest.warns(KernelWarning, match="outputs depend on the batch"):
                assert rows_at_once(CPU, torch.float32, (8, 64), 1) == ROW_BLOCKS[-1]
        else:
            assert rows_at_once(CPU, torch.float32, (8, 64), 1) == least
    assert tried[:3] == [ROW_BLOCKS[0], *ROW_BLOCKS[:2]]
    rows_at_once.cache_clear()


def test_products_whose_bits_depend_on_the_place_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.mm
    assert products.keeps_bits(CPU, torch.float32, (8, 64), 32)

    def by_place(x: Tensor, weight: Tensor) -> Tensor:
        return right(x, weight) + torch.arange(len(x))[:, None] * 1e-6

    monkeypatch.setattr(torch, "mm", by_place)
    assert not products.keeps_bits(CPU, torch.float32, (8, 64), 32)


def test_a_copy_kept_in_bf16_is_refused_where_kernels_decode() -> None:
    with by("portable"), pytest.raises(ValueError, match="keep_dequantized is of no use on cpu"):
        MegaMoE(MoEShape(64, 32, 4, 2), keep_dequantized=True)


def test_a_refused_weight_leaves_the_expert_what_it_had() -> None:
    shape = MoEShape(64, 32, 4, 2)
    batch = make_batch(shape, 9)
    layer = make_layer(shape)
    before = layer(batch.hidden, batch.ids, batch.weights)
    gate_up, down = make_weights(shape, seed=5)
    with pytest.raises(ValueError, match="down of expert 2"):
        layer.load_expert(2, gate_up[2], down[2][:, :16])
    assert torch.equal(layer(batch.hidden, batch.ids, batch.weights), before)


# ---- ranks whose CPUs sum in different ways ----


def mixed(
    group: EPGroup, arithmetic: str, batch: Batch, shares: list[slice], other: Path | None = WRITTEN_OUT
) -> tuple[Tensor, str]:
    """Rank 1 has another arithmetic by default than rank 0. The output, and what was said if there is none."""
    shape, mine = MoEShape(64, 32, 4, 2), batch.part(shares[group.rank])
    with using(other) if group.rank else using(runnable()[-1]):
        layer = MegaMoE(shape, group, arithmetic=arithmetic)
        layer.load_experts(*make_weights(shape))
        try:
            return layer(mine.hidden, mine.ids, mine.weights), ""
        except ValueError as refusal:
            return torch.empty(0), str(refusal)


def test_ranks_must_sum_alike_and_can_be_told_to(ranks: LocalRanks) -> None:
    shape = MoEShape(64, 32, 4, 2)
    batch, shares = make_batch(shape, 20), split(20, 2)
    for _, said in ranks.run(mixed, "auto", batch, shares, size=2):
        assert "arithmetic is fma on rank 0, bf16-dot on rank 1" in said
        assert 'arithmetic="fma" is what CPUs with and without BF16 instructions have in common' in said
    with using(runnable()[-1]):
        expected = oracle(shape, batch, "mxfp4", "mxfp8")
    assert torch.equal(torch.cat([out for out, _ in ranks.run(mixed, "fma", batch, shares, size=2)]), expected)


def test_a_rank_without_kernels_is_no_matter_of_an_arithmetic(ranks: LocalRanks) -> None:
    batch, shares = make_batch(MoEShape(64, 32, 4, 2), 20), split(20, 2)
    for _, said in ranks.run(mixed, "auto", batch, shares, None, size=2):
        assert "arithmetic is fma on rank 0, torch on rank 1" in said
        assert "kernels are missing on rank 1, where torch multiplies: `megamoe doctor` says there why" in said
        assert "in common" not in said


def test_an_arithmetic_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"arithmetic must be one of auto, .*fma on this CPU, got 'fp64'"):
        MegaMoE(MoEShape(64, 32, 4, 2), arithmetic="fp64")
