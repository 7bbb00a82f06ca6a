"""Generation on one rank: attention per sequence, sequences that meet at the experts, sampling, what is refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megamoe.model.generation.engine import Generation
from megamoe.model.generation.forward import (
    fits_together,
    forward_alone,
    forward_together,
    new_cache,
    replaced_forwards,
    silenced,
    use_own_attention,
)
from megamoe.model.generation.meeting import Meeting, Place
from megamoe.model.generation.places import find_places
from megamoe.model.generation.request import GenerationRequest, Prompt, check_fits
from megamoe.model.generation.sampling import Sampling, choose, draw
from megamoe.model.generation.sequences import ARGUMENT, OtherAttentionError, SequenceBatch, SequenceCache, attend
from megamoe.model.loading.load import load, load_tokenizer
from megamoe.model.making.tiny import FAMILIES, write_tiny
from tests.generation_cases import Experts, on_one_rank, prompts, texts

TOGETHER = ("deepseek-v3", "mixtral", "qwen3-moe", "gpt-oss")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Loaded models by family, each made when first asked for."""
    folder, made = tmp_path_factory.mktemp("models"), dict[str, Any]()

    def get(family: str) -> Any:
        if family not in made:
            write_tiny(folder / family, family)
            made[family] = load(folder / family)
        return made[family]

    return get


# ---- texts ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompts_tokens_do_not_depend_on_its_company(models: Callable[[str], Any], family: str) -> None:
    model, given = models(family), prompts(5)
    together = on_one_rank(model, GenerationRequest(given, max_new_tokens=20))
    assert len({tuple(token.token for token in text) for text in together}) == len(given)
    for number in (0, 1, 4):
        (alone,) = on_one_rank(model, GenerationRequest((given[number],), max_new_tokens=20))
        assert [token.token for token in alone] == [token.token for token in together[number]]


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_change_no_token(models: Callable[[str], Any], family: str) -> None:
    model, request = models(family), GenerationRequest(prompts(3), max_new_tokens=8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = on_one_rank(model, request)
        torch.set_num_threads(2)
        assert on_one_rank(model, request) == one
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_apart_texts_are_those_of_transformers_own_loop(models: Callable[[str], Any], family: str) -> None:
    model, given = models(family), prompts(3)
    request = GenerationRequest(given, max_new_tokens=12, stop_ids=frozenset({model.config.eos_token_id}))
    ours = on_one_rank(model, request, together=False)
    for prompt, text in zip(given, ours, strict=True):
        ids = torch.tensor([prompt.token_ids])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert theirs[0, len(prompt.token_ids) :].tolist() == [token.token for token in text]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_shared_where_only_attention_joins_tokens(models: Callable[[str], Any], family: str) -> None:
    model = models(family)
    experts = [each for each in model.modules() if hasattr(each, "idle")]
    calls = [each.layer.last_call for each in experts]
    assert fits_together(model, experts) == (family in TOGETHER)
    assert calls == [each.layer.last_call for each in experts]  # no rank would wait for another


def test_attention_of_a_shared_batch_is_the_models_own_but_for_rounding(models: Callable[[str], Any]) -> None:
    """Past a sliding window of 16, with sinks; without experts, since a rounding can send a token to another one."""
    for family in TOGETHER:
        model, (*_, prompt) = models(family), prompts(12)
        tokens, length = list(prompt.token_ids), len(prompt.token_ids)
        assert length > 32
        with silenced([each for each in model.modules() if hasattr(each, "idle")]):
            use_own_attention(model, own=True)
            cache: Any = SequenceCache()
            ours = [forward_together(model, [part])[0] for part in ((tokens, 0, cache), ([7], length, cache))]
            use_own_attention(model, own=False)
            cache = new_cache(model)
            theirs = [forward_alone(model, *part) for part in ((tokens, 0, cache), ([7], length, cache))]
        for own, other in zip(ours, theirs, strict=True):
            assert (own - other).norm() < 0.02 * other.norm()


def test_stop_tokens_and_limits_end_texts(models: Callable[[str], Any]) -> None:
    model, given = models("mixtral"), prompts(4)
    free = on_one_rank(model, GenerationRequest(given, max_new_tokens=16))
    stop = free[2][5].token
    request = GenerationRequest(given, max_new_tokens=16, stop_ids=frozenset({stop}), max_sequences=2)
    for text, before in zip(on_one_rank(model, request), free, strict=True):
        until = [token.token for token in before]
        stops = stop in until
        until = until[: until.index(stop) + 1] if stops else until
        assert [token.token for token in text] == until
        assert [token.finish for token in text] == [""] * (len(until) - 1) + ["stop" if stops else "length"]


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v4-flash"])
def test_threads_that_generate_with_one_model_get_the_texts_of_one_thread(
    models: Callable[[str], Any], family: str
) -> None:
    model, request = models(family), GenerationRequest(prompts(3), max_new_tokens=8)
    alone = on_one_rank(model, request)
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(on_one_rank, model, request) for _ in range(6)]
        assert all(each.result(60) == alone for each in found)
    assert on_one_rank(model, request) == alone


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v4-flash"])
def test_a_model_is_as_it_was_between_the_steps_of_generations(models: Callable[[str], Any], family: str) -> None:
    model, request = models(family), GenerationRequest(prompts(3), max_new_tokens=6)
    ids = torch.tensor([[3, 1, 2]])
    before, alone = model(ids).logits, on_one_rank(model, request)
    first = Generation(model, None, request)
    tokens = first.step()
    second = Generation(model, None, GenerationRequest(prompts(2, seed=5), max_new_tokens=3))
    while not first.done:
        assert torch.equal(model(ids).logits, before)
        tokens += first.step()
        second.step()
    assert texts(request, tokens) == alone


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v4-flash"])
def test_a_generation_whose_step_was_interrupted_is_not_gone_on_with(models: Callable[[str], Any], family: str) -> None:
    model, request = models(family), GenerationRequest(prompts(3), max_new_tokens=6)
    alone, generation = on_one_rank(model, request), Generation(model, None, request)
    generation.step()
    with replaced_forwards([(generation.experts[-1], interrupted)]), pytest.raises(KeyboardInterrupt):
        generation.step()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot go on, a step ended in KeyboardInterrupt: make a new one"):
            generation.step()
    assert on_one_rank(model, request) == alone


def interrupted(*_: Any) -> Tensor:
    raise KeyboardInterrupt


def test_experts_that_one_thread_has_silenced_answer_the_others() -> None:
    experts, hidden = Experts(), torch.ones(2, 3)
    with silenced([experts]), ThreadPoolExecutor(1) as pool:
        assert torch.equal(experts(hidden, hidden, hidden), 0 * hidden)
        assert torch.equal(pool.submit(experts, hidden, hidden, hidden).result(10), 2 * hidden)
    assert torch.equal(experts(hidden, hidden, hidden), 2 * hidden)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_choose_no_token(bad: float, temperature: float) -> None:
    logits = torch.tensor([1.0, bad, 3.0, -math.inf])
    for wrong in (logits, torch.full((4,), -math.inf)):
        with pytest.raises(ValueError, match=r"prompt p7: the model gives .* as the largest logit of token 5"):
            choose(wrong, Sampling(temperature), "p7", 5)
    assert choose(torch.tensor([1.0, 3.0, -math.inf]), Sampling(1e-310), "p7", 5) == 1


def test_draws_depend_on_seed_and_prompt_and_not_on_company(models: Callable[[str], Any]) -> None:
    model, given = models("qwen3-moe"), prompts(4)

    def drawn(given: tuple[Prompt, ...], seed: int) -> list[list[int]]:
        request = GenerationRequest(given, 12, Sampling(temperature=0.8, top_p=0.9, top_k=50, seed=seed))
        return [[token.token for token in text] for text in on_one_rank(model, request)]

    all_four = drawn(given, 1)
    assert drawn(given[2:], 1) == all_four[2:]
    assert drawn(given, 2) != all_four


# ---- attention ----


class _Layer(nn.Module):
    layer_idx = 0


def reference(query: Tensor, key: Tensor, value: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """One sequence in FP64, query by query: [1, q, S, D] -> [1, S, q, D]"""
    heads, new, total = query.shape[1], query.shape[2], key.shape[2]
    out = torch.empty(1, new, heads, value.shape[-1], dtype=torch.float64)
    for head in range(heads):
        k, v = (states[0, head * key.shape[1] // heads].double() for states in (key, value))
        for row in range(new):
            last = total - new + row
            first = 0 if window is None else max(0, last - window + 1)
            scores = k[first : last + 1] @ query[0, head, row].double() / math.sqrt(query.shape[-1])
            if sinks is not None:
                scores = torch.cat((scores, sinks[head : head + 1].double()))
            weights = torch.softmax(scores, 0)[: last + 1 - first]
            out[0, row, head] = weights @ v[first : last + 1]
    return out


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_each_sequence_attends_to_itself(window: int | None, with_sinks: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    sinks = torch.randn(4, generator=rng) if with_sinks else None
    caches, kept = [SequenceCache() for _ in range(3)], [list[Tensor](), list[Tensor](), list[Tensor]()]
    for lengths in ([9, 1, 5], [1, 1, 1], [1, 3, 1], [70, 1, 2], *([1, 1, 1] for _ in range(70))):  # past what fits
        batch = SequenceBatch(caches, lengths)
        query, key, value = (torch.randn(1, n, sum(lengths), 8, generator=rng) for n in (4, 2, 2))
        new_key, new_value = batch.update(key, value, 0)
        out, _ = attend(_Layer(), query, new_key, new_value, None, 8**-0.5, 0.0, window, sinks, **{ARGUMENT: batch})
        of_each = [torch.split(states, lengths, 2) for states in (query, key, value)]
        split = zip(*of_each, torch.split(out, lengths, 1), strict=True)
        for past, (q, k, v, o) in zip(kept, split, strict=True):
            past.append(torch.stack((k, v)))
            keys, values = torch.cat(past, 3)
            torch.testing.assert_close(o.double(), reference(q, keys, values, window, sinks), rtol=1e-5, atol=1e-5)


def test_attention_that_was_not_told_whose_tokens_they_are_is_refused() -> None:
    query, key = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)
    with pytest.raises(OtherAttentionError, match="was not told"):
        attend(_Layer(), query, key, key, None)
    batch = SequenceBatch([SequenceCache()], [3])
    with pytest.raises(OtherAttentionError, match="other tokens"):  # that were not cached
        attend(_Layer(), query, key, key, None, **{ARGUMENT: batch})
    batch.update(key, key, 0)
    with pytest.raises(OtherAttentionError, match="other tokens"):  # more than those
        attend(_Layer(), query, torch.cat((key, key), 2), torch.cat((key, key), 2), None, **{ARGUMENT: batch})


def test_a_window_keeps_what_it_holds_and_no_more() -> None:
    cache, keys = SequenceCache(), torch.arange(400.0).view(1, 400, 1)
    sizes = []
    for first, last in ((0, 90), (90, 91), (91, 99), *((at, at + 1) for at in range(99, 400))):
        new = keys[:, first:last]
        found, _ = cache.append(0, new, new, 16)
        assert torch.equal(found, keys[:, max(0, first - 15) : last])
        sizes.append(cache.layers[0]._stacks[0].shape[1])
    assert max(sizes) <= 200
    assert sizes[-1] < 100


# ---- sequences that meet ----


def test_sequences_meet_at_every_experts_once() -> None:
    layers = [Experts(), Experts()]
    meeting = Meeting([Place(layer, 0, all=True) for layer in layers])

    def sequence(rows: int) -> Callable[[], Tensor]:
        def work() -> Tensor:
            x = torch.full((rows, 3), float(rows))
            for layer in layers:
                x = layer(x, torch.zeros(rows, 1), torch.ones(rows, 1)) + 1
            return x

        return work

    with meeting.held():
        found = meeting.run([sequence(rows) for rows in (2, 1, 4)])
    assert [float(x[0, 0]) for x in found] == [4 * rows + 3 for rows in (2, 1, 4)]
    assert [len(x) for x in found] == [2, 1, 4]
    assert [layer.calls for layer in layers] == [[7], [7]]
    assert layers[0](torch.ones(1, 3), torch.zeros(1, 1), torch.ones(1, 1)).sum() == 6  # as before


def test_what_one_sequence_raises_ends_all_and_leaves_no_thread() -> None:
    layer = Experts()
    meeting, before = Meeting([Place(layer, 0, all=True)]), threading.active_count()

    def good() -> Tensor:
        return layer(torch.ones(1, 3), torch.zeros(1, 1), torch.ones(1, 1))

    def bad() -> Tensor:
        raise ValueError("of one sequence")

    with meeting.held():
        with pytest.raises(ValueError, match="of one sequence"):
            meeting.run([good, bad])
        with pytest.raises(RuntimeError, match="once each, in order"):
            meeting.run([good, lambda: torch.ones(1)])
        with pytest.raises(RuntimeError, match="more than once"):
            meeting.run([lambda: good() + good()])
    assert threading.active_count() == before


class _Twice(nn.Module):
    """Of tokens [1, S, .]."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor, *, other: Tensor | None = None, scale: object = None) -> tuple[Tensor, None]:
        self.calls.append(x.shape[1])
        return 2 * x + (0 if other is None else other) + (1 if scale else 0), None


def test_sequences_meet_where_they_call_alike_and_pass_what_only_some_of_them_call() -> None:
    first, some, last, layer = _Twice(), _Twice(), _Twice(), Experts()
    places = [*(Place(each, 1, all=False) for each in (first, some, last)), Place(layer, 0, all=True)]
    meeting = Meeting(places)

    def sequence(tokens: int) -> Callable[[], Tensor]:
        def work() -> Tensor:
            x = torch.full((1, tokens, 1), float(tokens))
            x, nothing = first(x, other=x)
            assert nothing is None
            if tokens > 1:
                x = some(x)[0]
            x = last(x, scale=tokens if tokens == 3 else None)[0]  # what differs between sequences is not joined
            return layer(x[0], torch.zeros(tokens, 1), torch.ones(tokens, 1))

        return work

    with meeting.held():
        found = meeting.run([sequence(tokens) for tokens in (1, 2, 3)])
    alone = [sequence(tokens)() for tokens in (1, 2, 3)]
    assert all(torch.equal(*each) for each in zip(found, alone, strict=True))
    assert first.calls[:1] == [6]
    assert some.calls[:1] == [5]
    assert last.calls[:3] == [1, 2, 3]
    assert layer.calls[:1] == [6]


def test_v4_meets_at_its_blocks_and_at_what_is_dense_in_its_attention(models: Callable[[str], Any]) -> None:
    model = models("deepseek-v4-flash")
    experts = [each for each in model.modules() if hasattr(each, "idle")]
    places = find_places(model, experts)
    names = {module: name for name, module in model.named_modules()}
    found = {names[each.module]: each for each in places}
    assert [name for name, each in found.items() if each.all] == [f"model.layers.{layer}.mlp" for layer in range(4)]
    for name in ("self_attn.q_b_proj", "self_attn.o_a_proj", "self_attn.compressor.indexer.q_b_proj", "attn_hc"):
        assert f"model.layers.1.{name}" in found
    assert not any(name.endswith(("self_attn", "compressor", "compressor.kv_norm", "layers.1")) for name in found)
    assert not any("forward" in vars(each.module) for each in places)  # as it was
    model.megamoe_loading, loaded = None, model.megamoe_loading  # not ours: bits are promised of experts alone
    try:
        assert [each.module for each in find_places(model, experts)] == experts
    finally:
        model.megamoe_loading = loaded


# ---- sampling ----


def test_the_most_likely_token_and_of_equal_ones_the_first() -> None:
    assert choose(torch.tensor([0.0, 3.0, 1.0, 3.0]), Sampling(), "a", 0) == 1


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    draws = [choose(logits, Sampling(temperature=1.0), "a", index) for index in range(2000)]
    for token, share in enumerate((0.1, 0.2, 0.3, 0.4)):
        assert abs(draws.count(token) / 2000 - share) < 0.04
    assert {choose(logits, Sampling(1.0, top_k=1), "a", index) for index in range(50)} == {3}
    assert {choose(logits, Sampling(1.0, top_p=0.65), "a", index) for index in range(200)} == {2, 3}
    assert {choose(logits, Sampling(1.0, top_p=0.1), "a", index) for index in range(50)} == {3}
    cold = [choose(logits, Sampling(temperature=0.05), "a", index) for index in range(200)]
    assert cold.count(3) > 190
    assert draw(0, "a", 1) != draw(0, "b", 1) != draw(1, "b", 1) != draw(1, "b", 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"temperature": -1.0}, "temperature must be 0 .* got -1.0"),
        ({"temperature": math.inf}, "got inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_k": -2}, "top_k must be at least 1.* got -2"),
        ({"top_k": 1.5}, "top_k must be an integer, got 1.5"),
        ({"seed": 1.0}, "seed must be an integer, got 1.0"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
    ],
)
def test_sampling_that_cannot_be_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**arguments)


# ---- what is refused ----


def test_requests_that_cannot_be_met_are_refused_with_the_numbers() -> None:
    of_floats: Any = (1, 2.0)
    for arguments, said in (
        (((),), "no prompts"),
        (((Prompt("a", ()),),), "prompt a has no tokens"),
        (((Prompt("a", (1,)), Prompt("a", (2,))),), "two prompts have the id a"),
        ((prompts(1), 0), "max_new_tokens must be at least 1, got 0"),
        ((prompts(1), 2.5), "max_new_tokens must be an integer, got 2.5"),
        ((prompts(1), 2, Sampling(), {"</s>"}), "a token of stop_ids must be an integer, got '</s>'"),
        ((prompts(1), 2, Sampling(), 7), "stop_ids must be tokens, got 7"),
        (((Prompt("a", of_floats),),), "a token of prompt a must be an integer, got 2.0"),
    ):
        with pytest.raises(ValueError, match=said):
            GenerationRequest(*arguments)
    request = GenerationRequest((Prompt("a", tuple(range(20))),), max_new_tokens=5)
    check_fits(request, 20, 25)
    with pytest.raises(ValueError, match=r"prompt a has 20 tokens.* the 24 that the model takes: at most 4 new"):
        check_fits(request, 20, 24)
    with pytest.raises(ValueError, match="the 12 that the model takes: shorten it"):
        check_fits(request, 20, 12)
    with pytest.raises(ValueError, match="token 19, outside of the model's vocabulary of 19"):
        check_fits(request, 19, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_files_of_a_tokenizer_has_none(tmp_path: Path, family: str) -> None:
    write_tiny(tmp_path / "tiny", family)
    load_tokenizer(tmp_path / "tiny")
    (tmp_path / "tiny" / "tokenizer.json").unlink()
    (tmp_path / "tiny" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "tiny")
