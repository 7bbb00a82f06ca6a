"""What calls share: threads take turns, terms are compared whole, and only what was exchanged can break a group."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.turns import Turns
from megamoe.routing.agreement import fit_text
from megamoe.shape import MoEShape
from tests.cases import computing, make_batch, make_layer, make_weights, oracle

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2)
CPU = torch.device("cpu")


def output(layer: MegaMoE) -> Tensor:
    batch = make_batch(SHAPE, 40)
    return layer(batch.hidden, batch.ids, batch.weights)


def expected() -> Tensor:
    return oracle(SHAPE, make_batch(SHAPE, 40), "mxfp4", "mxfp8")


# ---- threads and layers that share a group ----


def from_threads(layers: list[MegaMoE], calls: int) -> list[Tensor]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda call: output(layers[call % len(layers)]), range(calls)))


def test_one_layer_called_from_several_threads_gives_right_outputs() -> None:
    assert all(torch.equal(out, expected()) for out in from_threads([make_layer(SHAPE)], 60))


def test_layers_of_one_group_called_from_several_threads_give_right_outputs() -> None:
    group = EPGroup.of(None)
    layers = [make_layer(SHAPE, group, name=name) for name in ("a", "b", "c")]
    assert all(torch.equal(out, expected()) for out in from_threads(layers, 60))


def threads_on_ranks(group: EPGroup) -> bool:
    layer = make_layer(SHAPE, group)
    return all(torch.equal(out, expected()) for out in from_threads([layer], 12))


def test_threads_of_several_ranks_may_call_one_layer_in_any_order(ranks: LocalRanks) -> None:
    assert ranks.run(threads_on_ranks, size=2) == [True, True]


def layers_in_another_order(group: EPGroup) -> str:
    layers = [make_layer(SHAPE, group, name=name) for name in ("a", "b")]
    try:
        output(layers[group.rank])
    except ValueError as refusal:
        return str(refusal)
    return ""


def test_layers_that_ranks_call_in_different_orders_are_refused_by_name(ranks: LocalRanks) -> None:
    for said in ranks.run(layers_in_another_order, size=2):
        assert "layer is a on rank 0, b on rank 1" in said
        assert "must call the same layers in the same order" in said


def test_weights_loaded_by_another_thread_are_not_mixed_into_a_call() -> None:
    layer, other = make_layer(SHAPE), MegaMoE(SHAPE)
    other.load_experts(*make_weights(SHAPE, seed=4))
    either = [expected(), output(other)]
    stop = threading.Event()

    def swap() -> None:
        seeds = [4, 0] * 10
        for seed in seeds:
            layer.load_experts(*make_weights(SHAPE, seed=seed))
        stop.set()

    swapping = threading.Thread(target=swap)
    swapping.start()
    while not stop.is_set():
        out = output(layer)
        assert any(torch.equal(out, each) for each in either)
    swapping.join(10)
    assert torch.equal(output(layer), expected())


def test_a_call_from_inside_of_a_call_is_refused_and_not_waited_for() -> None:
    turns = Turns()
    with turns.take("layer 'a'", CPU, 5.0):
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match="layer 'b'"), turns.take("layer 'b'", CPU, 5.0):
            pass
        assert time.monotonic() - begun < 1.0
    with turns.take("layer 'b'", CPU, 5.0):
        pass


def test_a_turn_that_is_never_given_back_ends_the_wait_at_the_deadline() -> None:
    turns, taken, done = Turns(), threading.Event(), threading.Event()

    def holds() -> None:
        with turns.take("layer 'a'", CPU, 5.0):
            taken.set()
            done.wait(20)

    holder = threading.Thread(target=holds)
    holder.start()
    try:
        assert taken.wait(5)
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match="layer 'a'"), turns.take("layer 'b'", CPU, 0.3):
            pass
        assert 0.25 < time.monotonic() - begun < 3.0
    finally:
        done.set()
        holder.join(5)
    with turns.take("layer 'b'", CPU, 0.3):
        pass


# ---- what breaks a group, and what does not ----


class Cut(BaseException):
    """As Ctrl-C comes: no Exception."""


@pytest.mark.parametrize("raised", [MemoryError, KeyboardInterrupt, Cut, ValueError])
def test_a_rank_alone_can_be_used_again_after_any_interruption(raised: type[BaseException]) -> None:
    layer = make_layer(SHAPE)

    def fails(*_: object) -> Tensor:
        raise raised

    with computing(layer, fails), pytest.raises(raised):
        output(layer)
    assert torch.equal(output(layer), expected())


def fails_in_mid_call(group: EPGroup) -> list[str]:
    """What every rank hears of a ValueError in the middle of a call, and of the next call."""
    layer, said = make_layer(SHAPE, group), []

    def fails(*_: object) -> Tensor:
        raise ValueError("a table that does not fit")

    for block in (computing(layer, fails), nullcontext()):
        with block, pytest.raises((ValueError, RuntimeError)) as error:
            output(layer)
        said.append(str(error.value))
    return said


def test_a_value_error_in_the_middle_of_a_call_breaks_a_group(ranks: LocalRanks) -> None:
    for first, second in ranks.run(fails_in_mid_call, size=2):
        assert "a table that does not fit" in first
        assert "broken" in second or "cannot be used" in second, second


def refused_and_used_again(group: EPGroup) -> bool:
    layer, batch = make_layer(SHAPE, group), make_batch(SHAPE, 40)
    with pytest.raises(ValueError, match="topk_ids"):
        layer(batch.hidden, batch.ids + (100 if group.rank else 0), batch.weights)
    return torch.equal(output(layer), expected())


def test_a_refusal_that_all_ranks_know_of_leaves_the_group_usable(ranks: LocalRanks) -> None:
    assert ranks.run(refused_and_used_again, size=2) == [True, True]


def test_a_refused_reload_keeps_every_weight_that_was_there() -> None:
    layer = make_layer(SHAPE)
    gate_up, down = make_weights(SHAPE, seed=3)
    down[4, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="down of expert 4"):
        layer.load_experts(gate_up, down)
    assert torch.equal(output(layer), expected())


# ---- terms ----


@pytest.mark.parametrize("size", [16, 64])
def test_terms_that_do_not_fit_are_told_apart_all_the_same(size: int) -> None:
    texts = [
        "a" * 63,
        "a" * 64,
        "a" * 65,
        "a" * 100,
        "a" * 99 + "b",
        "b" + "a" * 99,
        "a" * 50 + "b" + "a" * 49,
        "é" * 40,
    ]
    assert len({fit_text(text, size) for text in texts}) == len(texts)
    assert all(len(fit_text(text, size)) <= size for text in texts)
    assert fit_text("layers.0.ffn", size) == b"layers.0.ffn"


def other_ends(group: EPGroup, what: str) -> str:
    long = "x" * 100 + str(group.rank)
    options = {"name": long} if what == "layer" else {"waves": tuple([1] * 40 + [group.rank + 1])}
    layer = make_layer(SHAPE, group, **options)
    try:
        output(layer)
    except ValueError as refusal:
        return str(refusal)
    return ""


@pytest.mark.parametrize("what", ["layer", "waves"])
def test_ranks_whose_long_terms_differ_at_the_end_are_refused(ranks: LocalRanks, what: str) -> None:
    for said in ranks.run(other_ends, what, size=2):
        assert f"{what} is" in said
