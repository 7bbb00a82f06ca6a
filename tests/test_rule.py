"""The rule: its threshold by hand, a made-up machine that obeys it turns where it says, and the figure is drawn."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from megamoe.launch.bench.bench import BenchReport, BenchRequest
from megamoe.launch.bench.rule import (
    RuleReport,
    RuleRequest,
    exposed_share,
    fit_turn,
    link_for,
    run_rule,
    theory_share,
    threshold_flops_per_byte,
)
from megamoe.launch.lab.namespaces import parse_rate
from tests.commands import invoked, refused
from tests.test_demo import command
from tests.test_lab import needs_lab

FLOPS_PER_S = 60e9
TINY = ("--tokens-per-rank", 24, "--hidden", 64, "--intermediate", 32, "--num-experts", 6, "--topk", 2, "--repeats", 2)


def obey(request: BenchRequest, floor: float = 0.0) -> BenchReport:
    """A machine of 60 GFLOP/s whose overlap is perfect but for a floor, as a share of compute."""
    rows = request.tokens_per_rank * request.topk
    flops = 6 * request.hidden * request.intermediate * rows
    # half of the rows leave; of 16 experts on 2 ranks, top-4, all tokens but 70 of 1820 do
    sent = rows / 2 * (8 + 2 * request.hidden) + rows / 4 * (1 - 70 / 1820) * (request.hidden + request.hidden // 32)
    compute = flops / FLOPS_PER_S * 1e3
    communication = sent / (parse_rate(request.link) / 8) * 1e3 if request.link else 1.0
    overlapped = max(compute, communication) + floor * compute
    asked = {field.name: getattr(request, field.name, None) for field in fields(BenchReport)}
    known = {
        "compute_ms": compute,
        "communication_ms": communication,
        "overlapped_ms": overlapped,
        "overlapped_ms_min": 0.9 * overlapped,
        "overlapped_ms_max": 1.1 * overlapped,
        "link_gb_s": parse_rate(request.link) / 8e9 if request.link else None,
        "flops_per_rank": flops,
        "bytes_sent_per_rank": round(sent),
        "identical": request.check,
    }
    return BenchReport(**{**asked, **known})  # type: ignore[arg-type]


# ---- arithmetic ----


@pytest.mark.parametrize(
    ("intermediate", "f_remote", "expected"),
    [(3072, 1.0, 6144), (3072, 0.5, 12288), (2048, 1.0, 4096)],
    ids=["v4-pro", "half-of-the-pairs-stay", "v4-flash"],
)
def test_the_threshold_is_the_papers_2d(intermediate: int, f_remote: float, expected: float) -> None:
    assert threshold_flops_per_byte(7168, intermediate, 3 * 7168, f_remote) == expected


def test_every_byte_of_the_wire_counts() -> None:
    request = RuleRequest()
    share = (1 - 70 / 1820) / 2  # two of four pairs are on the other rank, 70 of 1820 choices have none there
    assert request.tokens_per_row == pytest.approx(share)
    assert request.bytes_per_row == pytest.approx(8 + 1056 * share + 2048)
    assert request.threshold(512) == pytest.approx(6 * 1024 * 512 / request.bytes_per_row / 0.5)
    assert replace(request, dispatch_format="bf16").bytes_per_row == pytest.approx(8 + 2048 * share + 2048)
    four = replace(request, ranks=4)
    assert four.tokens_per_row == pytest.approx(1 - 495 / 1820)
    assert four.threshold(512) == pytest.approx(6 * 1024 * 512 / four.bytes_per_row / 0.75)


def test_shares_of_communication() -> None:
    assert exposed_share(120, 100, 80) == 0.25
    assert exposed_share(90, 100, 80) == 0
    assert [theory_share(x) for x in (0.5, 1, 2, 4)] == [0, 0, 0.5, 0.75]


def test_a_link_is_written_as_tc_reads_it() -> None:
    assert link_for(0.5, 6.4e10, 2000) == "512000kbit"
    assert parse_rate(link_for(1.0, 6e10, 3000)) == 1.6e8


# ---- the fit ----


@pytest.mark.parametrize(("turn", "floor", "slope"), [(1.0, 0.0, 1.0), (0.93, 0.12, 1.05), (1.3, 0.05, 0.9)])
def test_the_fit_finds_a_turn_that_was_put_there(turn: float, floor: float, slope: float) -> None:
    points = [(x, 1 + floor + slope * max(0, x - turn)) for x in RuleRequest().points]
    found = fit_turn(points[::-1])
    assert found is not None
    assert asdict(found) == pytest.approx({"x": turn, "floor": floor, "slope": slope}, abs=0.01)


def test_four_points_are_enough_and_one_that_is_off_counts_less_the_longer_it_took() -> None:
    points = [(0.5, 1.0), (1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    found = fit_turn(points)
    assert found is not None
    assert (found.x, found.slope) == pytest.approx((1, 1), abs=0.01)
    off = fit_turn([*points, (4.0, 4.0), (8.0, 9.6)])
    assert off is not None
    assert off.slope < 1.25, "1.29 where all count alike"


@pytest.mark.parametrize(
    "points",
    [
        [(0.5, 1.0), (1.0, 1.0), (2.0, 2.0)],
        [(0.25, 1.1), (0.5, 1.1), (0.7, 1.12), (0.85, 1.12)],
        [(1.0, 1.0)] * 9,
        [],
    ],
    ids=["three-points", "all-before-it", "one-x", "none"],
)
def test_no_turn_is_made_up(points: list[tuple[float, float]]) -> None:
    assert fit_turn(points) is None


# ---- the sweep ----


def test_a_machine_that_obeys_turns_at_1_for_both_sizes() -> None:
    request = RuleRequest()
    report = run_rule(request, measure=obey)
    for curve, intermediate in zip(report.curves, (512, 1024), strict=True):
        assert curve.intermediate == intermediate
        assert [point.x for point in curve.points] == pytest.approx(request.points, rel=1e-4)
        assert curve.turn is not None
        assert asdict(curve.turn) == pytest.approx({"x": 1, "floor": 0, "slope": 1}, abs=0.01)
        assert abs(curve.largest_deviation) < 1e-3
    small, large = report.curves
    assert large.threshold_flops_per_byte == 2 * small.threshold_flops_per_byte


def test_what_overlap_costs_shows_as_the_floor_and_as_deviation_on_the_fastest_link() -> None:
    report = run_rule(RuleRequest(intermediate=(512,)), measure=lambda request: obey(request, floor=0.1))
    (curve,) = report.curves
    assert curve.turn is not None
    assert asdict(curve.turn) == pytest.approx({"x": 1, "floor": 0.1, "slope": 1}, abs=0.01)
    assert curve.largest_deviation == pytest.approx(0.1 / 0.25, rel=1e-3)
    assert curve.largest_deviation_x == pytest.approx(0.25, rel=1e-3)


def test_progress_counts_every_run() -> None:
    seen: list[tuple[str, int, int]] = []
    run_rule(RuleRequest(points=(0.5, 2.0)), lambda *now: seen.append(now), obey)
    assert [done for _, done, _ in seen] == list(range(6))
    assert {of for *_, of in seen} == {6}
    assert seen[0][0] == "intermediate 512: compute alone"


# ---- the figure ----


def drawn(report: RuleReport, form: str) -> bytes:
    pytest.importorskip("matplotlib")
    from megamoe.launch.cli import figures

    return figures.draw(report, form)


def test_the_figure_has_its_titles_and_both_sizes() -> None:
    report = run_rule(RuleRequest(), measure=obey)
    svg = drawn(report, "svg").decode()
    for text in ("x = (C/B) / balance point", "exposed share of communication", "overlapped time / compute time"):
        assert text in svg
    for text in ("theory: max(0, 1 - 1/x)", "d = 512", "d = 1024: turns at x = 1.00", report.machine, report.date):
        assert text in svg
    assert drawn(report, "svg").decode() == svg
    assert drawn(report, "png").startswith(b"\x89PNG")


def test_a_figure_of_one_point_is_drawn_too() -> None:
    report = run_rule(RuleRequest(intermediate=(512,), points=(1.0,)), measure=obey)
    assert "d = 512: no turn" in drawn(report, "svg").decode()


# ---- the command ----


@needs_lab
def test_json_holds_every_point_and_the_fit(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = invoked("bench", "rule", *TINY, "--points", 1, "--format", "json", "--figure", tmp_path / "rule.svg")
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["identical"] is True
    assert (report["hidden"], report["intermediate"], report["points"]) == (64, [32], [1.0])
    # of 6 experts on 2 ranks, top-2: 3 of 15 choices have none on the other rank; a row is 64 + 2, filled up to 80
    assert report["bytes_per_row"] == pytest.approx(8 + 80 * (1 - 3 / 15) + 128)
    assert report["f_remote"] == 0.5
    (curve,) = report["curves"]
    assert curve["turn"] is None
    (point,) = curve["points"]
    bench = point["bench"]
    c = bench["flops_per_rank"] / bench["compute_ms"] * 1e3
    assert point["hardware_flops_per_byte"] == pytest.approx(c / (bench["link_gb_s"] * 1e9))
    assert point["x"] == pytest.approx(point["hardware_flops_per_byte"] / curve["threshold_flops_per_byte"])
    assert point["exposed_share_min"] <= point["exposed_share"] <= point["exposed_share_max"]
    assert "wrote" in done.stderr
    assert "<svg" in (tmp_path / "rule.svg").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ranks": 1}, "ranks must be at least 2 for anything to be sent, got 1"),
        ({"tokens_per_rank": 0}, "tokens_per_rank must be at least 1, got 0"),
        ({"dispatch_format": "auto"}, "dispatch_format auto changes the bytes of a row between links"),
        ({"intermediate": ()}, "intermediate must name one size"),
        ({"intermediate": (512, 512)}, r"several different ones, got \(512, 512\)"),
        ({"intermediate": (512, 100), "weight_format": "mxfp4"}, "intermediate 100 is not a multiple of 32"),
        ({"points": ()}, r"points must be between 0.01 and 100, got \[\]"),
        ({"points": (1.0, -1.0)}, "points must be between"),
        ({"points": (float("nan"),)}, "points must be between"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ],
)
def test_wrong_requests_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RuleRequest(**changes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--points", "1,fast"], "points '1,fast' are not numbers such as 0.5,1,2"),
        (["--figure", "rule.gif"], "figure rule.gif must end in .svg or .png"),
        (["--figure", "nowhere/rule.svg"], "is in no folder that exists"),
    ],
)
def test_a_wrong_command_exits_with_2(arguments: list[str], said: str) -> None:
    assert said in refused("bench", "rule", *arguments)


def test_a_figure_without_matplotlib_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError(name='matplotlib')")
    done = command("bench", "rule", "--figure", tmp_path / "rule.svg", COLUMNS="200", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "--figure needs matplotlib: pip install 'megamoe[figures]'" in done.stderr


def test_a_machine_without_a_lab_exits_with_2(tmp_path: Path) -> None:
    assert "shaped links need" in refused("bench", "rule", PATH=str(tmp_path))
