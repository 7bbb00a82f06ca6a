"""What a layer decides for itself: played schedules, a measured link, and the same decision on every rank."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamoe.catalog import Machine, load_machine
from megamoe.execution.autotune import Tuner
from megamoe.execution.experts import Experts
from megamoe.execution.journeys import CallRecord
from megamoe.execution.products import products_of
from megamoe.launch.lab.namespaces import lab
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.link import measure_link
from megamoe.parallel.transport.pairs import Label
from megamoe.routing.agreement import Agreement
from megamoe.schedule.cost_model import CostModel, Spread, best_waves, play
from megamoe.schedule.kept import Setting, keep
from megamoe.schedule.machine import product_row_us
from megamoe.schedule.schedule import schedule
from megamoe.shape import MoEShape
from tests.cases import Batch, make_batch, make_layer, oracle, split
from tests.test_lab import needs_lab

SHAPE = MoEShape(hidden=128, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)
TWO = Spread(8, 2)


@pytest.fixture(scope="module", autouse=True)
def nothing_kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What megamoe bench has kept of this machine is nothing to these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_schedule_played_by_hand() -> None:
    assert play(Spread(2, 2), 1, 400, CostModel(1.0, 0.5, 1.0, 0.0)).total == 500
    # a wave of its own for each expert: 100 rows come at 50 and at 100; 50 local rows cannot be cut from an expert,
    # so the head is expert 2's 100; then 100 that came, home at 300; expert 3's 100 that came, home at 400; the tail
    assert play(Spread(2, 2), 2, 400, CostModel(1.0, 0.5, 1.0, 0.0)).total == 400
    assert play(Spread(2, 2), 2, 400, CostModel(1.0, 0.5, 1.0, 7.0)).total == 428  # four steps


@given(
    st.integers(1, 4).map(lambda ranks: Spread(4, ranks)),
    st.integers(1, 8),
    st.floats(16, 1e5),
    st.floats(1e-3, 10),
)
def test_no_schedule_is_faster_than_its_compute_or_its_link(
    spread: Spread, waves: int, rows: float, journey: float
) -> None:
    cost_model = CostModel(1.0, 0.34 * journey, 0.66 * journey, 0.0)
    took = play(spread, waves, rows, cost_model).total
    remote = rows * (1 - 1 / spread.ep_size)
    assert took >= max(rows, remote * journey) * (1 - 1e-9)
    assert took <= (rows + remote * journey) * (1 + 1e-9), "waiting for nothing"


def test_waves_are_few_where_the_link_is_fast_and_many_at_the_balance_point() -> None:
    balanced = CostModel(1.0, 0.68, 1.32, 0.0)  # half the rows travel, each twice as long as it computes
    assert best_waves(TWO, 4096, dataclasses.replace(balanced, wave_s=1.0)) == 8
    fast = CostModel(1.0, 0.0068, 0.0132, 40.0)
    assert best_waves(TWO, 4096, fast) == 1
    assert best_waves(Spread(16, 1), 4096, balanced) == 1


def tuner(
    size: int,
    link: float | None,
    *,
    packed: bool = False,
    dispatch_format: str = "auto",
    machine: Machine | None = None,
    overlap: bool = True,
) -> Tuner:
    class Nothing:
        early = True

        def gather(self, page: torch.Tensor, label: Label) -> torch.Tensor:
            assert label.phase == "link"
            return page.unsqueeze(0)

    group = EPGroup(0, size, Nothing() if size > 1 else None, 60.0)  # type: ignore[arg-type]
    if link is not None:
        group.links.append(link)
    weight_format = "mxfp4" if packed else "bf16"
    experts = Experts(MoEShape(1024, 512, 16, 4), range(8), weight_format=weight_format, device=torch.device("meta"))
    experts.device = torch.device("cpu")  # whose waves have a cost, but without memory for the weights
    return Tuner(
        "moe",
        group,
        experts,
        waves="auto" if overlap else 1,
        dispatch_format=dispatch_format,
        combine_format="bf16",
        overlap=overlap,
        machine=machine,
    )


def agreed(row_s: float, tokens: int = 2048, size: int = 2) -> Agreement:
    counts = torch.full((size, 16), tokens * 4 // 16)
    return Agreement([tokens] * size, counts, counts, row_s)  # each row brings a token of its own


@pytest.mark.parametrize(
    ("size", "link", "packed", "expected"),
    [
        (2, 125e6, False, "mxfp8"),
        (2, 5e9, False, "bf16"),
        (2, 5e9, True, "mxfp8"),
        (1, None, False, "bf16"),
        (1, None, True, "mxfp8"),
    ],
    ids=["slow link", "fast link", "fast link, tokens are rounded anyway", "alone", "alone, packed"],
)
def test_fp8_travels_only_where_it_pays(size: int, link: float | None, packed: bool, expected: str) -> None:
    each = tuner(size, link, packed=packed)
    assert each.choose(agreed(0.0, size=size)).wire.dispatch_format == expected == each.dispatch_format


@pytest.mark.parametrize("overlap", [True, False])
def test_only_a_layer_that_overlaps_computes_before_rows_have_come(overlap: bool) -> None:
    load = tuner(2, 38.75e6, overlap=overlap).choose(agreed(40e-6)).cost_model.load([512] * 8, [4096])
    assert any(not step.arrived for step in schedule([range(8)], load)) is overlap


def test_waves_follow_from_link_and_compute_once_both_are_known_and_then_stay() -> None:
    each = tuner(2, 38.75e6)  # 310 Mbit/s
    assert each.choose(agreed(0.0)).waves == 8  # the rule for the first call
    row_s = 40e-6  # as long as half of a row's journeys: the balance point
    assert each.choose(agreed(row_s)).waves == 8
    each = tuner(2, 2e9)
    assert [each.choose(agreed(row_s)).waves for _ in range(6)] == [1] * 6
    each._group.links[0] = 38.75e6
    assert each.choose(agreed(row_s)).waves == 1, "settled for calls of this size"
    assert each.choose(agreed(row_s, tokens=8192)).waves != 1, "not for larger ones"


def test_the_tuner_learns_the_least_time_for_a_row_from_calls_with_enough_of_them() -> None:
    each = tuner(2, 1e9)
    for rows, seconds in ((10, 1.0), (1000, 0.03), (1000, 0.02), (2000, 0.05)):
        each.note(CallRecord(rows_local=rows // 2, rows_received=rows // 2, compute_s=seconds))
    assert each.row_s == pytest.approx(20e-6)


def machine(**values: float) -> Machine:
    """The machine that ships, with other constants."""
    ships = load_machine("cpu")
    return ships.model_copy(
        update={key: getattr(ships, key).model_copy(update={"value": value}) for key, value in values.items()}
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_machines_profile_says_what_compute_takes_until_it_is_measured(packed: bool) -> None:
    profile = machine(product_gflops=100.0)
    each = tuner(2, 38.75e6, packed=packed, machine=profile)
    assert each.row_s == product_row_us(profile, 1024, 512, packed=packed) / 1e6 > 31e-6
    each.note(CallRecord(rows_local=1000, compute_s=0.5))
    assert each.row_s == 500e-6, "what is measured counts"
    assert tuner(2, 38.75e6, packed=packed).row_s == 0, "what ships is of some machine, not of this one"


def test_what_a_wave_costs_is_the_machines() -> None:
    row_s = 40e-6
    cheap, dear = (tuner(2, 200e6, machine=machine(wave_us=us)).choose(agreed(row_s)) for us in (10.0, 20000.0))
    assert cheap.waves != 1
    assert dear.waves == 1


@pytest.fixture
def kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """Keeps constants of this machine for two ranks, in a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def put(**values: float) -> Machine:
        setting = Setting.here(products_of(torch.device("meta")).path, torch.get_num_threads(), 2, shaped=True)
        assert keep(setting, machine(**values)) == ""
        return machine(**values)

    return put


def test_auto_takes_what_was_measured_of_this_machine(kept_here: Callable[..., Machine]) -> None:
    profile = kept_here(wave_us=20000.0, product_gflops=100.0)
    each = tuner(2, 200e6)
    assert each.row_s == product_row_us(profile, 1024, 512, packed=False) / 1e6, "before anything is measured"
    assert each.choose(agreed(40e-6)).waves == 1
    assert each._group.wave_costs == [20e-3]
    given = tuner(2, 200e6, machine=machine(wave_us=10.0))
    assert given.choose(agreed(40e-6)).waves != 1, "a profile that is handed in goes first"
    assert tuner(3, 200e6).row_s == 0, "nothing is kept for three ranks"


def test_the_dearest_wave_of_all_ranks_counts(ranks: LocalRanks) -> None:
    assert ranks.run(dearest, size=3) == [3e-3] * 3


def dearest(group: EPGroup) -> float:
    assert group.wave_cost("moe", 1e-3 * (group.rank + 1)) == group.wave_cost("moe", 0.0), "asked once"
    return group.wave_costs.pop()


def a_call_with_a_machine(group: EPGroup) -> str:
    layer = MegaMoE(SHAPE, group, machine=machine(wave_us=100.0 + group.rank), weight_format="bf16")
    generator = torch.Generator().manual_seed(0)
    layer.load_experts(torch.randn(10, 192, 128, generator=generator), torch.randn(10, 128, 96, generator=generator))
    try:
        layer(torch.zeros(4, 128), torch.zeros(4, 4, dtype=torch.int64) - 1, torch.zeros(4, 4))
    except ValueError as wrong:
        return str(wrong)
    return ""


def test_ranks_with_different_machines_say_so(ranks: LocalRanks) -> None:
    for complaint in ranks.run(a_call_with_a_machine):
        assert "waves" in complaint
        assert "auto at 100 us" in complaint


def measured(group: EPGroup) -> tuple[float, float]:
    assert group.transport is not None
    begun = time.perf_counter()
    rate = measure_link(group.transport, group.rank, group.size, "moe", torch.device("cpu"), group.workspace)
    return rate, time.perf_counter() - begun


@needs_lab
def test_a_links_rate_is_what_it_was_shaped_to() -> None:
    with lab(3, "200mbit") as hosts, LocalRanks(3, threads_per_rank=1, hosts=hosts) as ranks:
        for size, within in ((2, 0.3), (3, 0.4)):  # two senders to one link lose a part of it
            found = ranks.run(measured, size=size)
            assert len({rate for rate, _ in found}) == 1, "all ranks must have the same figure"
            assert found[0][0] == pytest.approx(25e6, rel=within)
            assert max(took for _, took in found) < 2


def auto_everything(group: EPGroup, batch: Batch, shares: list[slice]) -> tuple[list[torch.Tensor], list[int], float]:
    mine = batch.part(shares[group.rank])
    layer = make_layer(SHAPE, group, dispatch_format="auto", waves="auto")
    outputs, waves = [], []
    for _ in range(3):
        outputs.append(layer(mine.hidden, mine.ids, mine.weights))
        waves.append(layer.last_call.waves)
    return outputs, waves, sum(layer.group.links)


def test_ranks_decide_alike_and_the_bits_stay(ranks: LocalRanks) -> None:
    batch, shares = make_batch(SHAPE, 20_000), split(20_000, 3)
    found = ranks.run(auto_everything, batch, shares, size=3)
    expected = oracle(SHAPE, batch, "mxfp4", "mxfp8")
    for number in range(3):
        assert torch.equal(torch.cat([outputs[number] for outputs, *_ in found]), expected)
    assert len({tuple(waves) for _, waves, _ in found}) == 1
    assert len({link for *_, link in found}) == 1
    assert found[0][2] > 0, "the link was measured"
