"""Claims about the serving model: what is cached, held, multiplied and waited for, by hand-computed numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.catalog import Hardware, Model, find_profile, load_hardware, load_model, load_profile, override
from megamoe.planner.layer.cost import LayerTime, layer_time
from megamoe.planner.layer.expert import Expert
from megamoe.planner.serving.attention import AttentionCost, attention_cost, draft_attention
from megamoe.planner.serving.deployment import Deployment
from megamoe.planner.serving.flops import efficiency
from megamoe.planner.serving.memory import memory
from megamoe.planner.serving.serving import costs_of, explain, serve
from megamoe.planner.serving.step import Piece, step_pieces, waits_us
from megamoe.planner.validation.published import RESULTS, Comparison, published

MILLION = 1 << 20


@cache
def model(name: str) -> Model:
    return load_model(name)


@cache
def hardware(name: str) -> Hardware:
    return load_hardware(name)


@cache
def costs(name: str) -> list[AttentionCost]:
    return [attention_cost(attention, model(name).hidden) for attention in model(name).attention]


def deployment(name: str, device: str, **sizes: Any) -> Deployment:
    return Deployment(model(name), hardware(device), find_profile(hardware(device)), **sizes)


def pro(**changes: Any) -> Deployment:
    """V4-Pro on 32 GB200, 64 sequences each, unless said otherwise."""
    sizes = {"devices": 32, "ep": 32, "batch_per_device": 64, "context": 8192}
    return deployment("deepseek-v4-pro", "gb200", **{**sizes, **changes})


def cached_bytes(name: str, context: int, kv_format: str, index_format: str) -> int:
    return sum(cost.layers * cost.cache_bytes(context, kv_format, index_format) for cost in costs(name))


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("deepseek-v3", 61 * (512 + 64) * 2),  # 70272: the published 70.27 KB
        ("deepseek-v3.2", 61 * (576 + 128) * 2),
        ("qwen3-235b-a22b", 94 * 2 * 4 * 128 * 2),
    ],
)
def test_cache_of_a_token_in_bf16(name: str, per_token: int) -> None:
    assert cached_bytes(name, 1000, "bf16", "bf16") == 1000 * per_token


def test_eight_bit_entries_are_laid_out_as_flashmla_stores_them() -> None:
    assert costs("deepseek-v3")[0].entry_bytes("fp8") == 512 + 4 * 4 + 64 * 2 == 656
    assert {cost.entry_bytes("fp8") for cost in costs("deepseek-v4-pro")} == {448 + 8 + 64 * 2}  # 584
    assert costs("deepseek-v3.2")[0].index_entry_bytes("fp8") == 132
    assert next(c for c in costs("deepseek-v4-pro") if c.kind == "csa").index_entry_bytes("fp4") == 68


def test_v4_pro_caches_what_vllm_says_at_a_million_tokens() -> None:
    """9.62 GiB in BF16; ours has the blocks that are not full yet on top, 18 MB."""
    assert cached_bytes("deepseek-v4-pro", MILLION, "bf16", "bf16") / 2**30 == pytest.approx(9.62, rel=0.003)


def test_v4_pro_caches_two_percent_of_grouped_queries() -> None:
    """V4 report 2.3.4: about 2 % of BF16 GQA with 8 KV heads of 128."""
    grouped = 61 * MILLION * 2 * 8 * 128 * 2
    assert cached_bytes("deepseek-v4-pro", MILLION, "fp8", "fp4") / grouped == pytest.approx(0.02, abs=0.002)


def test_csa_reads_its_choice_and_its_window_and_scores_every_compressed_entry() -> None:
    csa = next(cost for cost in costs("deepseek-v4-flash") if cost.kind == "csa")
    assert (csa.entries(8192), csa.indexed(8192), csa.stored(8192)) == (512 + 128, 2048, 2048 + 128)
    assert (csa.entries(100), csa.indexed(100)) == (25 + 100, 25)
    assert csa.core_flops(8192) == 640 * 64 * (512 + 512) * 2
    assert csa.index_flops(8192) == 2048 * 64 * 128 * 2


def test_hca_reads_every_entry_of_128_tokens() -> None:
    hca = next(cost for cost in costs("deepseek-v4-pro") if cost.kind == "hca")
    assert hca.entries(MILLION) == 8192 + 128
    assert hca.index_flops(MILLION) == 0


def test_mla_attends_absorbed_in_decode_and_unfolded_in_prefill() -> None:
    mla = costs("deepseek-v3")[0]
    assert mla.core_flops(1) == 2 * 128 * (576 + 512)
    assert mla.prefill_core_flops(0, 10) == 55 * 2 * 128 * (192 + 128)


@pytest.mark.parametrize(
    ("name", "together"),
    [("deepseek-v3.2", [1]), ("deepseek-v4-pro", [128, 1]), ("gpt-oss-120b", [128, 128])],
    ids=["chosen", "all_and_chosen", "window_and_all"],
)
def test_a_prefill_reads_entries_once_for_128_queries_where_none_are_chosen(name: str, together: list[int]) -> None:
    """The last 2000 of 3000 tokens: chosen entries are read by every query for itself."""
    for cost, queries in zip(costs(name), together, strict=True):
        entries = sum(cost.entries(context) for context in range(1001, 3001))
        read = cost.prefill_read_bytes(1000, 3000, "fp8")
        assert read == pytest.approx(entries * cost.entry_bytes("fp8") / queries)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2", "kimi-k2"])
def test_the_products_of_a_latent_are_all_its_weights(name: str) -> None:
    cost = costs(name)[0]
    assert sum(product.weights for product in cost.products) == cost.weights
    assert sum(product.weights for product in cost.prefill_products) == cost.weights


def test_what_a_token_moves_between_the_products_by_hand() -> None:
    """V3: 164 KB for each absorbed half, which is far more than its hidden state's 14."""
    mla = costs("deepseek-v3")[0]
    assert [product.name for product in mla.products] == ["down", "q up", "absorb", "values up", "out"]
    assert [product.values for product in mla.products] == [
        7168 + 1536 + 512 + 64,
        1536 + 128 * 192,
        128 * (128 + 512),
        128 * (512 + 128),
        128 * 128 + 7168,
    ]
    assert mla.pass_bytes == 3 * (7168 + 1536 + 128 * 128) + 4 * (1536 + 512 + 64 + 128 * 64)
    assert mla.query_bytes == 2 * 128 * (576 + 512)  # read and written by the core; its products do the rest


def test_a_dense_prefill_moves_unfolded_keys_and_values_once() -> None:
    """4 prompts of 2000 tokens, 1000 of each cached: queries and results of 1000, keys and values of 2000."""
    d = deployment(
        "deepseek-v3", "h100", devices=8, ep=8, batch_per_device=4, context=2000, cached=1000, phase="prefill"
    )
    values = next(piece for piece in step_pieces(costs_of(d), d) if piece.name == "mla core's values")
    assert values.nbytes == 4 * (1000 + 2000) * 128 * (192 + 128) * 2
    assert costs("deepseek-v3")[0].prefill_value_bytes(0, 1) == 163840
    assert values.us == values.memory_us


def core_of(d: Deployment) -> Piece:
    return next(piece for piece in step_pieces(costs_of(d), d) if piece.name.endswith(" core"))


def test_a_dense_cache_of_eight_bits_is_multiplied_in_eight_bits_where_a_kernel_does_so() -> None:
    sizes = {"devices": 8, "ep": 8, "batch_per_device": 64, "context": 4096}
    for device, eight, sixteen in (("gb200", 0.6 * 5000, 0.6 * 2500), ("h20", 0.74 * 296, 0.87 * 148)):
        fp8, bf16 = (core_of(deployment("deepseek-v3", device, **sizes, kv_format=kv)) for kv in ("fp8", "bf16"))
        assert fp8.compute_us == pytest.approx(fp8.flops * 1e-6 / eight)
        assert bf16.compute_us == pytest.approx(bf16.flops * 1e-6 / sixteen)
    unpacked = core_of(deployment("deepseek-v3.2", "gb200", **sizes, kv_format="fp8"))
    assert unpacked.compute_us == pytest.approx(unpacked.flops * 1e-6 / (0.6 * 2500))


def test_a_device_without_figures_of_its_own_has_the_profiles() -> None:
    """MI300X: 60 % of 1307 TFLOP/s and the profile's 78 % of 5.3 TB/s, no more than a launch for a call."""
    core = core_of(deployment("deepseek-v3", "mi300x", devices=8, ep=8, batch_per_device=64, context=4096))
    assert core.compute_us == pytest.approx(core.flops * 1e-6 / (0.6 * hardware("mi300x").tflops("bf16")))
    assert core.memory_us == pytest.approx(core.nbytes / (5.3e6 * load_profile("default").memory_efficiency.value))
    assert core.call_us == 0


def test_figures_of_attention_are_shares_and_yes_or_no() -> None:
    with pytest.raises(ValueError, match="attention_8bit_efficiency is a share of the peak"):
        override(hardware("gb200"), {"attention_8bit_efficiency": 1.2})
    with pytest.raises(ValueError, match=r"attention_spill is 0 or 1, not 0\.5"):
        override(find_profile(hardware("gb200")), {"attention_spill": 0.5})
    without = override(hardware("gb200"), {"attention_8bit_efficiency": "none"})
    d = deployment("deepseek-v3", "gb200", devices=8, ep=8, batch_per_device=64, context=4096)
    core = core_of(replace(d, hardware=without))
    assert core.compute_us == pytest.approx(core.flops * 1e-6 / (0.6 * 2500))  # unpacked


def test_one_operator_keeps_what_is_between_the_products() -> None:
    """Ascend's prolog: one piece, no passes; the same weights and FLOPs as the pieces elsewhere."""
    sizes = {"devices": 16, "ep": 16, "batch_per_device": 64, "context": 4096}
    one, many = (deployment("deepseek-v3", device, **sizes) for device in ("ascend-910c", "h100"))
    names = [piece.name for piece in step_pieces(costs_of(one), one) if piece.part == "projections"]
    assert "mla projections" in names
    assert "mla passes" not in names
    split = [piece for piece in step_pieces(costs_of(many), many) if piece.name.startswith("mla ")]
    assert (
        sum(piece.flops for piece in split if piece.part == "projections") == 2 * 64 * costs("deepseek-v3")[0].weights
    )
    assert [piece.kernels for piece in split if piece.part == "projections"] == [0, 0, 0, 0, 0, 10]


def test_speculated_tokens_share_what_is_not_chosen() -> None:
    """Four tokens of a sequence read a dense cache once, and up to four times what an index chooses for each."""
    dense, chosen = costs("deepseek-v3")[0], costs("deepseek-v3.2")[0]
    assert dense.read_bytes(65536, "fp8", 4) == dense.read_bytes(65536, "fp8", 1)
    assert chosen.read_bytes(65536, "fp8", 4) == 4 * 2048 * 656
    assert chosen.read_bytes(4096, "fp8", 4) == 4096 * 656


def test_linear_attention_keeps_a_state_instead_of_a_cache() -> None:
    linear = next(cost for cost in costs("qwen3-next-80b-a3b") if cost.kind == "linear")
    assert linear.cache_bytes(10, "bf16", "bf16") == linear.cache_bytes(100_000, "bf16", "bf16") == 32 * 128 * 128 * 4
    assert linear.core_flops(10) == linear.core_flops(100_000) > 0
    assert linear.read_bytes(10, "bf16", 1) == 2 * 32 * 128 * 128 * 4, "read and written"


def test_draft_layer_of_v4_looks_at_its_window_alone() -> None:
    csa = next(attention for attention in model("deepseek-v4-pro").attention if attention.kind == "csa")
    draft = attention_cost(draft_attention(csa), 7168)
    assert draft.entries(100_000) == 128
    assert draft.index_flops(100_000) == 0


KINDS = [
    cost
    for name in ("deepseek-v3.2", "deepseek-v4-flash", "gpt-oss-120b", "qwen3-next-80b-a3b")
    for cost in costs(name)
]


@pytest.mark.parametrize("cost", KINDS, ids=lambda cost: cost.kind)
@given(st.integers(0, 3000), st.integers(0, 1500))
@settings(deadline=None, max_examples=30)
def test_prefill_is_the_sum_over_its_tokens(cost: AttentionCost, start: int, new: int) -> None:
    positions = range(start + 1, start + new + 1)
    expected = sum(cost.prefill_pair_flops * cost.entries(t) + cost.token_flops for t in positions)
    assert cost.prefill_core_flops(start, start + new) == expected
    assert cost.prefill_index_flops(start, start + new) == sum(cost.index_flops(t) for t in positions)


@pytest.mark.parametrize(("name", "flops", "kept"), [("deepseek-v4-pro", 27, 10), ("deepseek-v4-flash", 10, 7)])
def test_v4_needs_the_share_of_v3_2_that_its_report_states(name: str, flops: int, kept: int) -> None:
    """At one million tokens: 27 % and 10 % of the FLOPs, 10 % and 7 % of the cache (ours: 26.7, 10.1; 10.5, 7.3)."""
    found = efficiency(model(name), model("deepseek-v3.2"), MILLION)
    assert round(100 * found.flops_share) == flops
    assert 100 * found.cache_share == pytest.approx(kept, abs=0.6)
    assert found.flops_share == sum(t.value for t in found.flops) / sum(t.value for t in found.baseline_flops)


def test_index_is_most_of_v3_2_at_a_million_tokens_and_little_of_v4() -> None:
    found = efficiency(model("deepseek-v4-pro"), model("deepseek-v3.2"), MILLION)
    index = {term.name: term.value for term in (*found.flops, *found.baseline_flops) if term.name.endswith("index")}
    assert index["dsa index"] == pytest.approx(61 * MILLION * 64 * 128 * 2 / 1e9)
    assert index["dsa index"] > 0.8 * sum(term.value for term in found.baseline_flops)
    assert index["csa index"] < 0.3 * sum(term.value for term in found.flops)


@cache
def comparisons() -> tuple[Comparison, ...]:
    return tuple(published())


ASCEND = [index for index, result in enumerate(RESULTS) if result.hardware == "ascend-950dt"]


@pytest.mark.parametrize("index", [i for i in ASCEND if RESULTS[i].role == "judged"], ids=lambda i: RESULTS[i].model)
def test_ascend_950dt_results_that_fitted_nothing_are_met_within_25_percent(index: int) -> None:
    found = comparisons()[index]
    assert found.published == pytest.approx(
        {"deepseek-v4-flash": 4722, "deepseek-v4-pro": 388}[found.result.model], rel=1e-3
    )
    assert abs(found.error_pct) <= 25, found


@pytest.mark.parametrize(("device", "most"), [("gb200", 19), ("h20", 15), ("h100", 13)], ids=["gb200", "h20", "h100"])
def test_serving_on_nvidia_is_met_as_the_page_says(device: str, most: float) -> None:
    """All but June's kernels on GB200, which September's overtook."""
    rows = [each for each in comparisons() if each.result.hardware == device and "June" not in each.result.what]
    assert len(rows) >= 2
    assert all(abs(row.error_pct) <= most for row in rows), rows


def test_h20s_runs_have_the_network_cards_of_their_source() -> None:
    rows = [result for result in RESULTS if result.hardware == "h20"]
    assert {result.deployment().hardware.nic_gb_s.one_way for result in rows} == {25.0}  # type: ignore[union-attr]
    assert hardware("h20").nic_gb_s.one_way == 50.0  # type: ignore[union-attr]


def test_more_sequences_a_device_pay_on_gb200_as_published() -> None:
    """NVFP4, 2000 tokens: 768 sequences in place of 1408 gave roughly one tenth less (LMSYS, part II); 6 % here."""
    full = next(each for each in comparisons() if "NVFP4 decode" in each.result.what).serving
    fewer = serve(replace(full.deployment, batch_per_device=768))
    assert 0.85 < fewer.tokens_per_s_per_device / full.tokens_per_s_per_device < 0.97


def test_ascend_950dt_results_share_one_profile_and_fit_in_memory() -> None:
    rows = [comparisons()[index] for index in ASCEND]
    assert len(rows) == 13
    assert len({row.serving.deployment.profile.name for row in rows}) == 1
    assert all(row.serving.fits for row in rows)
    errors = sorted(abs(row.error_pct) for row in rows)
    assert errors[len(errors) // 2] <= 15
    assert errors[-1] <= 30


def test_explain_shows_why_the_two_ascend_results_differ() -> None:
    """192 tokens a rank against 32: the one waits for products, the other for weights; twelve times the tokens."""
    flash, of_pro = ({term.name: term.value for term in explain(RESULTS[index].deployment())} for index in ASCEND[:2])
    assert (flash["tokens of a rank and step"], of_pro["tokens of a rank and step"]) == (192, 32)
    assert flash["routed: products"] > flash["routed: weights read"]
    assert of_pro["routed: weights read"] > 2 * of_pro["routed: products"]
    assert of_pro["memory: experts"] > 5 * flash["memory: experts"]
    assert flash["tokens per second and device"] > 10 * of_pro["tokens per second and device"]


@pytest.mark.parametrize("d", [pro(mtp=2), pro(phase="prefill", batch_per_device=4)], ids=["decode", "prefill"])
def test_explained_pieces_add_up_to_the_step(d: Deployment) -> None:
    terms = explain(d)
    served = serve(d)
    pieces = [term.value for term in terms if term.unit == "ms" and term.name.split(":")[0] != term.name]
    assert sum(pieces) == pytest.approx(served.step.total_us / 1e3)
    rate = next(term.value for term in terms if term.name == "tokens per second and device")
    assert rate == served.tokens_per_s_per_device
    assert all(term.formula and math.isfinite(term.value) for term in terms)


def test_weights_of_a_device_by_hand() -> None:
    """V4-Pro at EP16: 24 experts of 35.09 MB in 61 layers; attention, shared experts and tables everywhere."""
    held = serve(pro(devices=16, ep=16)).memory
    assert held.experts_gb == pytest.approx(61 * 24 * 3 * 7168 * 3072 * (0.5 + 1 / 32) / 1e9)
    tables = 2 * 2 * 129280 * 7168
    shared = 61 * 3 * 7168 * 3072
    assert held.weights_gb * 1e9 > tables + shared + 61 * 250e6
    assert held.weights_gb * 1e9 < tables + shared + 61 * 400e6


def test_redundant_experts_and_drafts_take_memory() -> None:
    plain = serve(pro()).memory
    assert serve(pro(redundant=32)).memory.experts_gb == pytest.approx(plain.experts_gb * 13 / 12)
    assert serve(pro(mtp=1)).memory.experts_gb == pytest.approx(plain.experts_gb * 62 / 61)


def test_tensor_parallel_attention_halves_weights_and_repeats_a_latent_cache() -> None:
    one, two = serve(pro()).memory, serve(pro(attention_tp=2)).memory
    assert two.cache_gb == pytest.approx(2 * one.cache_gb)
    assert two.weights_gb < 0.75 * one.weights_gb
    grouped = {"devices": 8, "ep": 8, "batch_per_device": 8, "context": 4096}
    plain = serve(deployment("qwen3-235b-a22b", "h200", **grouped)).memory
    split = serve(deployment("qwen3-235b-a22b", "h200", **grouped, attention_tp=4)).memory
    assert split.cache_gb == pytest.approx(plain.cache_gb)


def test_what_does_not_fit_names_what_would() -> None:
    """V4-Pro needs 16 of 950DT: the smallest unit that its maker's guide allows."""
    served = serve(deployment("deepseek-v4-pro", "ascend-950dt", devices=8, ep=8, batch_per_device=1, context=8192))
    assert not served.fits
    assert (served.smallest_ep, served.smallest_devices, served.largest_batch) == (16, 16, 0)
    small = serve(replace(served.deployment, devices=16, ep=16))
    assert small.fits
    assert (small.smallest_ep, small.largest_batch) == (None, None)


def test_largest_batch_is_the_last_that_fits() -> None:
    served = serve(pro(batch_per_device=100_000))
    assert not served.fits
    assert served.largest_batch is not None
    now = costs_of(served.deployment)
    assert memory(now, pro(batch_per_device=served.largest_batch)).fits
    assert not memory(now, pro(batch_per_device=served.largest_batch + 1)).fits


def test_price_and_power_by_hand() -> None:
    served = serve(pro())
    rate = served.tokens_per_s_per_device
    assert served.usd_per_million_tokens == pytest.approx(2.75 / 3600 / rate * 1e6)
    assert served.tokens_per_s_per_mw == pytest.approx(rate / 2.10e-3)


def test_rates_follow_from_the_step() -> None:
    served = serve(pro(mtp=2, accept=1.25))
    seconds = served.step.total_us / 1e6
    assert served.tpot_ms == pytest.approx(1e3 * seconds / 2.25)
    assert served.tokens_per_s_per_user == pytest.approx(2.25 / seconds)
    assert served.tokens_per_s_per_device == pytest.approx(64 * 2.25 / seconds)
    assert serve(pro(mtp=2)).deployment.accepted == pytest.approx(1 + 0.7 + 0.49)
    prompt = serve(pro(phase="prefill", batch_per_device=4, cached=4096))
    assert prompt.ttft_ms == pytest.approx(prompt.step.total_us / 1e3)
    assert prompt.tokens_per_s_per_device == pytest.approx(4 * 4096 / prompt.step.total_us * 1e6)


def test_two_micro_batches_pay_where_links_are_slow_and_cost_where_there_is_little_to_hide() -> None:
    """V3 on 72 H100 of 9 nodes: a gain at 256 sequences a device, a loss at 32, whose weights are read twice."""

    def gain(model: str, hardware: str, **sizes: Any) -> float:
        one, two = (serve(deployment(model, hardware, **sizes, microbatches=halves)) for halves in (1, 2))
        return one.step.total_us / two.step.total_us

    nodes: dict[str, Any] = {"devices": 72, "ep": 72, "redundant": 32, "kv_format": "bf16", "context": 2050}
    assert gain("deepseek-v3", "h100", **nodes, batch_per_device=256) > 1 / 0.85
    assert gain("deepseek-v3", "h100", **nodes, batch_per_device=32) < 0.9
    assert gain("qwen3-30b-a3b", "h200", devices=1, ep=1, batch_per_device=4, context=2048) < 1


def test_links_of_a_half_hide_behind_what_the_other_computes_meanwhile() -> None:
    layer = _layer(dispatch=140, combine=280, experts=100)
    assert waits_us(layer, 300, 20, cut=False) == 280 - 100 - 20
    assert waits_us(layer, 300, 20, cut=True) == 140 + 280 - 300 - 20
    assert waits_us(layer, 500, 20, cut=True) == 0
    late = replace(layer, core_us=layer.core_us + 60, layer_us=layer.layer_us + 60)
    assert waits_us(late, 300, 20, cut=False) == pytest.approx(280 + 30 - 100 - 20), "latency of an exchange waits too"
    assert waits_us(layer, 10, 0, cut=False) == 420 - 110, "of dispatch and combine on one link, no less than both"


@given(st.floats(0, 500), st.floats(0, 100), *[st.floats(0, 500)] * 3, st.booleans(), st.floats(1, 4))
@settings(deadline=None)
def test_a_half_takes_its_compute_and_its_links_at_least_and_both_at_most(
    attention: float, shared: float, dispatch: float, combine: float, experts: float, cut: bool, slower: float
) -> None:
    def took(times: float) -> float:
        layer = _layer(dispatch, combine, experts * times)
        waits = waits_us(layer, attention * times, shared * times, cut=cut)
        return (attention + shared + experts) * times + waits

    compute, links = attention + shared + experts, dispatch + combine
    assert max(compute, links) - 1e-6 <= took(1.0) <= compute + links + 1e-6
    assert took(1.0) <= took(slower) + 1e-6, "slower compute is never faster"


def _layer(dispatch: float, combine: float, experts: float) -> LayerTime:
    """All of it one after the other."""
    time = layer_time(Expert(4096, 2048, 256, 8), costs_of(pro()).device, ep=1, tokens_per_rank=0)
    total = dispatch + experts + combine
    return replace(
        time, layer_us=total, core_us=total, alone_us=experts, dispatch_us=dispatch, combine_us=combine, kernel_us=0.0,
        graph_us=0.0, stack_us=0.0,
    )  # fmt: skip


FASTER = ["memory_tb_s", "scaleup_gb_s", "nic_gb_s", "bf16_tflops", "fp8_tflops", "fp4_tflops"]


@pytest.mark.parametrize("figure", FASTER)
@given(st.sampled_from([1, 3, 8, 64, 257]), st.integers(0, 3), st.booleans(), st.floats(1.01, 8))
@settings(deadline=None, max_examples=15)
def test_a_faster_device_is_never_slower(figure: str, batch: int, mtp: int, prefill: bool, times: float) -> None:
    phase: dict[str, Any] = {"phase": "prefill"} if prefill else {"mtp": mtp}
    slow = pro(devices=96, ep=96, batch_per_device=batch, **phase)
    better = override(slow.hardware, {figure: getattr(slow.hardware, figure).one_way * times})
    assert serve(replace(slow, hardware=better)).step.total_us <= serve(slow).step.total_us * (1 + 1e-9)


@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 2), st.sampled_from([1, 16, 96]))
@settings(deadline=None, max_examples=40)
def test_a_larger_batch_is_never_faster_for_a_user(batch: int, more: int, halves: int, ep: int) -> None:
    small = pro(devices=ep, ep=ep, batch_per_device=2 * batch, microbatches=halves)
    large = replace(small, batch_per_device=2 * (batch + more))
    assert serve(large).step.total_us >= serve(small).step.total_us * (1 - 1e-9)
    assert serve(large).memory.total_gb > serve(small).memory.total_gb


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash", "gpt-oss-120b", "qwen3-next-80b-a3b"]
)
@given(st.integers(1, 60_000), st.integers(1, 60_000), st.sampled_from(["bf16", "fp8"]))
@settings(deadline=None, max_examples=20)
def test_a_longer_context_is_never_faster_or_smaller(name: str, context: int, more: int, kv_format: str) -> None:
    sizes = {"devices": 8, "ep": 8, "batch_per_device": 16, "kv_format": kv_format}
    short = serve(deployment(name, "b200", **sizes, context=context))
    long = serve(deployment(name, "b200", **sizes, context=context + more))
    assert long.step.total_us >= short.step.total_us * (1 - 1e-9)
    assert long.memory.cache_gb >= short.memory.cache_gb


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "devices is 0"),
        ({"batch_per_device": 0}, "batch_per_device is 0"),
        ({"context": 0}, "context is 0"),
        ({"ep": 0}, "ep is 0"),
        ({"ep": 385, "devices": 385}, "EP385 is larger than the 384 experts"),
        ({"ep": 24}, "32 devices cannot be divided into groups of EP24"),
        ({"attention_tp": 3}, "32 devices cannot be divided into attention groups of 3"),
        ({"attention_tp": 256, "devices": 256}, "attention_tp 256 is more than the 128 heads"),
        ({"attention_tp": 96, "devices": 96}, "attention_tp 96 leaves the scale-up domain of 72"),
        ({"context": 2_000_000}, "longer than deepseek-v4-pro's 1048576 positions"),
        ({"phase": "prefill", "cached": 8192}, "cached 8192 tokens of a prompt of 8192"),
        ({"mtp": -1}, "mtp is -1"),
        ({"mtp": 1, "accept": 1.5}, "accept is 1.5 of 1 drafted tokens"),
        ({"redundant": -4}, "redundant is -4"),
        ({"microbatches": 3}, "microbatches is 3"),
        ({"head_split": 64}, r"head_split 64 lies outside 1 .. 32"),
        ({"kv_format": "fp9"}, "kv_format 'fp9' is none of bf16, fp8, int8"),
        ({"index_format": "int3"}, "index_format 'int3' is none of"),
        ({"weight_format": "mxfp5"}, "no format is called 'mxfp5'"),
        ({"phase": "train"}, "phase is decode or prefill"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nonsense_is_refused_with_the_numbers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pro(**changes)


def test_a_model_without_mtp_drafts_nothing() -> None:
    with pytest.raises(ValueError, match="qwen3-235b-a22b has no MTP layer to draft 1 tokens with"):
        deployment("qwen3-235b-a22b", "h100", devices=8, ep=8, batch_per_device=1, context=10, mtp=1)


@pytest.mark.parametrize("value", [-450.0, float("nan"), 0.0])
def test_negative_bandwidth_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="scaleup_gb_s"):
        override(hardware("gb200"), {"scaleup_gb_s": value})
