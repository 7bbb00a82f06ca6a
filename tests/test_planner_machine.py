"""A machine's profile: what it predicts by hand, that a fit finds the constants behind runs, and bad input."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from megamoe.catalog import Machine, figures, load_machine
from megamoe.launch.cli.main import app
from megamoe.planner.validation.calibrate import as_yaml, calibrate, check, median_error, nonnegative
from megamoe.schedule.machine import Amounts, Run, choose_waves, communication_us, predict, read_runs
from megamoe.schedule.schedule import Link
from megamoe.schedule.training import predict_step

CPU = load_machine("cpu")
RUN = Run(2, 0.125, 2048, 1024, 512, 16, 4, "bf16", "bf16", 4)


def machine(**values: float) -> Machine:
    """CPU with other constants."""
    found = figures(CPU)
    return CPU.model_copy(
        update={key: found[key].model_copy(update={"value": float(value)}) for key, value in values.items()}
    )


ONLY_PRODUCTS = machine(
    product_gflops=100, weight_ns=0, decode_ns=0, value_ns=0, round_ns=0, call_us=0, wave_us=0, byte_ns=0,
    exchange_us=0, link_efficiency=1, burst_us=0, link_share=0, gradient_ns=0,
)  # fmt: skip


@pytest.mark.parametrize(("ranks", "together"), [(4, 2), (6, 3), (8, 2), (2, 2)])
def test_what_the_ranks_of_a_host_send_over_its_link(ranks: int, together: int) -> None:
    """Against all ways to choose 3 of 24 experts, for the tokens of a rank of the first host."""
    per_rank, size, tokens = 24 // ranks, 1024, 10
    run = Run(ranks, 0.125, tokens, size, 512, 24, 3, "bf16", "bf16", 1, ranks_per_host=together)
    chosen = [[expert // per_rank for expert in each] for each in combinations(range(24), 3)]
    far = [[rank for rank in each if rank >= together] for each in chosen]
    rows, to_ranks, to_hosts = (
        tokens * sum(map(len, each)) / len(chosen)
        for each in (far, [set(each) for each in far], [{rank // together for rank in each} for each in far])
    )
    assert run.link_combine_bytes == pytest.approx(together * rows * size * 2)
    said = rows + to_ranks - to_hosts
    assert run.link_dispatch_bytes == pytest.approx(together * (to_hosts * size * 2 + said * 8))
    plain = replace(run, node_limited=False)
    assert plain.link_dispatch_bytes == pytest.approx(together * (to_ranks * size * 2 + rows * 8))
    if ranks > together:
        many, each = (replace(found, tokens_per_rank=4000) for found in (run, plain))
        assert predict(many, CPU).communication_ms < predict(each, CPU).communication_ms
    alone = replace(run, ranks_per_host=1)
    assert (alone.link_dispatch_bytes, alone.link_combine_bytes) == (run.dispatch_bytes, run.combine_bytes)


def test_a_report_of_before_hosts_of_several_ranks_is_one_of_hosts_of_one() -> None:
    found = {key: each for key, each in asdict(RUN).items() if key not in ("ranks_per_host", "node_limited")}
    assert Run.of(found) == RUN


def runs() -> list[Run]:
    """Workloads of many kinds, at the machine's number of threads."""
    sizes = [(1024, 512, 16, 4), (2048, 512, 8, 2), (512, 1024, 32, 6), (1024, 1024, 16, 2)]
    links = [0.125, 0.25, None, 0.0625]
    return [
        Run(2, links[(number + place) % 4], tokens, *size, weights, wire, waves)
        for number, size in enumerate(sizes)
        for place, (tokens, weights, wire, waves) in enumerate(
            [
                (2048, "bf16", "bf16", 4),
                (512, "bf16", "mxfp8", 1),
                (1024, "mxfp4", "mxfp8", 2),
                (256, "mxfp4", "mxfp8", 8),
            ]
        )
    ]


def reports(behind: Machine) -> list[dict[str, Any]]:
    """What the benchmark would say of runs() on a machine that does exactly as predicted."""
    found = []
    for run in runs():
        predicted = asdict(predict(run, behind))
        found.append({**asdict(run), **{key: value for key, value in predicted.items() if key != "waves"}})
    return found


# ---- prediction ----


def test_bytes_of_a_run() -> None:
    missed = 70 / 1820  # no expert of 4 among 8 of 16: 8 over 4 of 16 over 4
    assert RUN.dispatch_bytes == pytest.approx(2048 * (1 - missed) * 2048 + 4096 * 8)
    assert RUN.combine_bytes == 4096 * 2048
    assert replace(RUN, dispatch_format="mxfp8").dispatch_bytes == pytest.approx(2048 * (1 - missed) * 1056 + 4096 * 8)


@pytest.mark.parametrize(
    ("changes", "rounded"),
    [
        ({}, 0),
        ({"dispatch_format": "mxfp8"}, (2048 + 2048 * 4) * 1024),
        ({"combine_format": "mxfp8"}, 2 * 2048 * 4 * 1024),
        ({"weight_format": "mxfp4"}, (2048 + 2048 * 4) * 1024 + 2048 * 4 * 512),
    ],
    ids=str,
)
def test_what_a_call_rounds(changes: dict[str, Any], rounded: int) -> None:
    """Tokens and their rows, activated rows where weights are packed, results there and at home."""
    assert Amounts.of(replace(RUN, **changes), 8).rounded == rounded


def test_a_machine_that_only_multiplies() -> None:
    found = predict(RUN, ONLY_PRODUCTS)
    products = 6 * 1024 * 512 * 8192 / 100e9 * 1e3
    link = (RUN.dispatch_bytes + RUN.combine_bytes) / 125e6 * 1e3
    assert found.compute_ms == pytest.approx(products)
    assert found.communication_ms == pytest.approx(link)
    assert found.serial_ms == pytest.approx(products + link)
    assert max(products, link) <= found.overlapped_ms < products + link


def test_more_ranks_than_cores_take_turns() -> None:
    four = predict(replace(RUN, ranks=4), ONLY_PRODUCTS)
    assert four.compute_ms == pytest.approx(2 * predict(RUN, ONLY_PRODUCTS).compute_ms)


def test_a_byte_that_costs_the_core_shows_only_where_both_run() -> None:
    free, costly = (predict(RUN, machine(byte_ns=value)) for value in (0, 2))
    assert costly.compute_ms == free.compute_ms
    assert costly.overlapped_ms > free.overlapped_ms


def test_a_link_that_carries_takes_its_share_of_the_core_the_longer_the_slower_it_is() -> None:
    free, costly = (machine(byte_ns=0, link_share=value) for value in (0, 0.2))
    for link_gb_s in (0.125, 0.5):
        run = replace(RUN, link_gb_s=link_gb_s, tokens_per_rank=512)
        took = (run.dispatch_bytes + run.combine_bytes) / link_gb_s / CPU.link_efficiency.value / 1e6
        more = predict(run, costly).overlapped_ms - predict(run, free).overlapped_ms
        assert 0.8 * 0.2 * took < more < 1.2 * 0.2 * took
    loopback = replace(RUN, link_gb_s=None)
    assert predict(loopback, costly) == predict(loopback, free)


def test_one_rank_has_no_link() -> None:
    found = predict(replace(RUN, ranks=1, link_gb_s=None, waves=0), CPU)
    assert found.communication_ms == 0
    assert found.overlapped_ms == found.compute_ms == found.serial_ms


def test_a_link_takes_a_burst_at_once() -> None:
    with_burst = communication_us(RUN, machine(burst_us=4000), 1)
    assert communication_us(RUN, machine(burst_us=0), 1) - with_burst == pytest.approx(
        4000 / CPU.link_efficiency.value, rel=1e-6
    )


def test_a_link_that_has_rested_passes_a_burst_again() -> None:
    link = Link(burst=3.0, least=0.5)
    assert link.carry(0.0, 2.0) == (0.0, 0.5)
    assert link.carry(0.0, 2.0) == (0.5, 1.0)
    assert link.carry(2.0, 4.0) == (2.0, 5.0), "one unit of the bucket was left over, and one has come in"
    assert link.carry(20.0, 2.0) == (20.0, 20.5)
    plain = Link()
    assert [plain.carry(0.0, 2.0), plain.carry(1.0, 3.0), plain.carry(9.0, 1.0)] == [(0, 2), (2, 5), (9, 10)]


def test_a_step_that_only_multiplies_takes_eight_thirds_more_in_its_backward() -> None:
    forward, step = (predict_step(replace(RUN, backward=backward), ONLY_PRODUCTS) for backward in (False, True))
    assert forward == predict(RUN, ONLY_PRODUCTS)
    assert step.compute_ms == pytest.approx(forward.compute_ms * (1 + 16 / 6))
    sent = RUN.gradient_tokens * 2048 + 4096 * (8 + 2048 + 16)
    assert step.communication_ms - forward.communication_ms == pytest.approx(sent / 125e6 * 1e3)
    backward = step.overlapped_ms - forward.overlapped_ms
    assert forward.compute_ms * 16 / 6 * (1 - 1e-9) <= backward < step.serial_ms - forward.serial_ms


def test_gradients_cost_what_the_machine_says_and_ranks_alone_send_none() -> None:
    cheap, dear = (machine(gradient_ns=value) for value in (0, 2))
    alone = replace(RUN, ranks=1, link_gb_s=None, waves=0, backward=True)
    more = predict_step(alone, dear).compute_ms - predict_step(alone, cheap).compute_ms
    assert more == pytest.approx(2 * 3 * 16 * 1024 * 512 / 1e6)
    assert predict_step(alone, dear).communication_ms == 0
    assert predict_step(alone, dear).overlapped_ms == predict_step(alone, dear).compute_ms


def test_auto_waves_are_few_where_the_link_is_fast() -> None:
    assert choose_waves(replace(RUN, waves=0, link_gb_s=100.0), machine(wave_us=500)) == 1
    assert choose_waves(replace(RUN, waves=0), machine(wave_us=50)) > 2
    assert predict(replace(RUN, waves=0), CPU).waves == choose_waves(RUN, CPU)


def test_other_threads_are_refused() -> None:
    with pytest.raises(ValueError, match="calibrated with 1 threads a rank, not 2"):
        predict(replace(RUN, threads_per_rank=2), CPU)


# ---- calibration ----


def test_nonnegative_least_squares() -> None:
    assert nonnegative(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([2.0, 5.0])) == pytest.approx([2, 3])
    assert nonnegative(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([2.0, 1.0]))[1] == 0
    assert nonnegative(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([2.0, 4.0])) == pytest.approx([2, 0])


@pytest.fixture(scope="module")
def behind() -> Machine:
    return machine(
        product_gflops=150, weight_ns=0.3, decode_ns=1.1, value_ns=0.7, round_ns=0.9, call_us=900, wave_us=300,
        link_efficiency=0.9, loopback_gb_s=3, exchange_us=120, byte_ns=1.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(behind: Machine) -> Machine:
    """The machine that a fit finds behind the runs."""
    return calibrate(reports(behind), CPU, name="found", cores=2, source="made up")


def test_a_fit_finds_the_machine_behind_the_runs(behind: Machine, found: Machine) -> None:
    assert median_error(check(reports(behind), found)) < 1
    for key in (
        "product_gflops",
        "decode_ns",
        "link_efficiency",
        "loopback_gb_s",
        "exchange_us",
        "byte_ns",
        "wave_us",
        "link_share",
    ):
        assert getattr(found, key).value == pytest.approx(getattr(behind, key).value, rel=0.05), key
    assert (found.name, found.product_gflops.tag, found.product_gflops.source) == ("found", "measured", "made up")


def test_what_runs_do_not_tell_is_kept() -> None:
    bf16 = [each for each in reports(CPU) if each["weight_format"] == "bf16" and each["link_gb_s"]]
    found = calibrate([*bf16, *bf16], machine(decode_ns=7, loopback_gb_s=9), name="x", cores=2, source="made up")
    assert (found.decode_ns.value, found.loopback_gb_s.value) == (7, 9)


def test_too_few_or_mixed_runs() -> None:
    with pytest.raises(ValueError, match="3 runs are too few to fit 6 constants: at least 8"):
        calibrate(reports(CPU)[:3], CPU, name="x", cores=2, source="made up")
    mixed = [*reports(CPU)[:8], {**reports(CPU)[8], "threads_per_rank": 2}]
    with pytest.raises(ValueError, match="1 and 2 threads a rank"):
        calibrate(mixed, CPU, name="x", cores=2, source="made up")
    with pytest.raises(ValueError, match="runs of --backward make no machine"):
        calibrate([{**each, "backward": True} for each in reports(CPU)], CPU, name="x", cores=2, source="made up")
    with pytest.raises(ValueError, match="went without waves make no machine"):
        calibrate([*reports(CPU), {**reports(CPU)[0], "small": True}], CPU, name="x", cores=2, source="made up")


def test_a_profile_survives_its_file(tmp_path: Path, found: Machine) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(as_yaml(found))
    assert load_machine(path) == found


# ---- files and the command ----


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[1]", "is no report"), ('{"ranks": 2}', "it has no link_gb_s, tokens_per_rank")],
)
def test_files_that_hold_no_runs(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "runs.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs(path)


def test_the_command_fits_checks_and_writes(tmp_path: Path) -> None:
    fit, unseen, written = (tmp_path / name for name in ("fit.json", "unseen.json", "here.yaml"))
    fit.write_text(json.dumps(reports(CPU)))
    unseen.write_text(json.dumps(reports(CPU)[::3]))
    arguments = ["calibrate", str(fit), "--check", str(unseen), "--write", str(written), "--cores", "2"]
    done = CliRunner().invoke(app, [*arguments, "--format", "json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["rows"], found["unseen_rows"]) == (16, 6)
    assert found["unseen_median_abs_pct_error"] < 2
    assert load_machine(written).product_gflops.value == found["machine"]["product_gflops"]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0
    assert "of 6 that it did not see" in table.stdout


def test_the_command_refuses(tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["calibrate", str(tmp_path / "none.json")])
    assert missing.exit_code == 2
    assert "there is no file" in missing.stderr
    fit = tmp_path / "fit.json"
    fit.write_text(json.dumps(reports(CPU)))
    for wrong, message in (
        (["--cores", "0"], "cores must be at least 1"),
        (["--start", "cpux"], "no machine is called 'cpux'"),
        (["--write", "/nowhere/x.yaml"], "/nowhere/x.yaml is in no folder that exists"),
    ):
        done = CliRunner().invoke(app, ["calibrate", str(fit), *wrong])
        assert done.exit_code == 2
        assert message in done.stderr
