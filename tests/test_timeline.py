"""The timeline: how intervals are added up, what the trace file holds, and what is drawn of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.launch.cli.timeline import drawn
from megamoe.parallel.recorder import Flight, Recording, Span
from megamoe.trace.timeline import CALL, FORWARD, LANES, Event, Share, Timeline, intersection, union
from tests.commands import refused
from tests.test_demo import command

MS = 1_000_000  # nanoseconds
INTERVALS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (min(pair), max(pair))))


def covered(intervals: list[tuple[float, float]]) -> set[int]:
    return {tick for begin, end in intervals for tick in range(int(begin), int(end))}


@given(INTERVALS, INTERVALS)
def test_unions_and_intersections_cover_what_sets_of_ticks_cover(
    a: list[tuple[float, float]], b: list[tuple[float, float]]
) -> None:
    assert covered(union(a)) == covered(a)
    assert all(one[1] < two[0] for one, two in zip(union(a), union(a)[1:], strict=False))
    common = intersection(union(a), union(b))
    assert covered(common) == covered(a) & covered(b)
    assert sum(end - begin for begin, end in common) == len(covered(common))


def event(lane: str, begin: float, end: float, *, rank: int = 0, layer: str = "moe", wave: int = 0) -> Event:
    return Event(layer, 1, rank, lane, wave, begin * 1000, end * 1000)


def test_communication_is_hidden_where_the_rank_computes_meanwhile() -> None:
    events = [
        event(CALL, 0, 20),
        event("dispatch", 1, 5),
        event("combine", 4, 11),  # on the way from 1 to 11, though 4 to 5 is in both
        event("linear-1", 3, 6),
        event("activation", 6, 7),
        event("reduce", 10, 20),
    ]
    share = Share.of(events)
    assert (share.total_us, share.compute_us, share.communication_us) == (20_000, 14_000, 10_000)
    assert share.hidden_us == 5_000  # 3 to 7, and 10 to 11
    assert share.hidden_percent == 50
    assert Share.of([event(CALL, 0, 2), event("linear-1", 0, 1)]).hidden_percent is None
    both = Share.sum([share, Share(30_000, 0, 10_000, 10_000)])
    assert (both.total_us, both.hidden_percent) == (30_000, 75)


def flight(lane: str, wave: int, received: tuple[int, ...], sent: float, arrived: float) -> Flight:
    return Flight("moe", 1, lane, wave, received, 100, int(sent * MS), int(arrived * MS))


def recordings() -> list[Recording]:
    """Rank 2 sends first, but no row of wave 0 to rank 0; wave 1 is sent to rank 0 while wave 0 is still on its way."""
    return [
        Recording(
            0,
            "a",
            [Span("moe", 1, CALL, 0, 0, 20 * MS, 0)],
            [flight("dispatch", 0, (0, 3, 0), 4, 9), flight("dispatch", 1, (0, 2, 2), 6, 12)],
        ),
        Recording(1, "b", [], [flight("dispatch", 0, (5, 0, 1), 2, 7), flight("dispatch", 1, (0, 0, 0), 7, 7)]),
        Recording(2, "c", [], [flight("dispatch", 0, (5, 1, 0), 1, 5), flight("dispatch", 1, (1, 1, 0), 8, 7.5)]),
    ]


def test_a_transfer_lasts_from_its_first_senders_start_to_its_last_rows_arrival() -> None:
    timeline = Timeline.merge(recordings())
    found = {(e.rank, e.wave): (e.begin_us, e.end_us, e.rows, e.bytes) for e in timeline.events if e.lane != CALL}
    assert found == {
        (0, 0): (2000, 9000, 3, 300),  # rank 1 sends it at 2
        (0, 1): (9000, 12000, 4, 400),  # sent at 7, when wave 0 still has the link
        (1, 0): (1000, 7000, 6, 600),  # rank 2 is first
        (2, 0): (2000, 5000, 6, 600),
        (2, 1): (6000, 7500, 2, 200),  # rank 0's part; a clock that disagrees cannot make it negative
    }
    assert timeline.hosts == {0: "a", 1: "b", 2: "c"}


def test_a_trace_file_is_chromes_format_and_reads_back_the_same(tmp_path: Path) -> None:
    timeline = Timeline.merge(recordings())
    timeline.save(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in written["traceEvents"] if e["name"] == "thread_name"}
    assert {name for (rank, _), name in names.items() if rank == 1} == {CALL, *LANES}
    slices = [e for e in written["traceEvents"] if e["ph"] == "X"]
    assert len(slices) == len(timeline.events)
    assert all(e["dur"] >= 0 and names[e["pid"], e["tid"]] == e["cat"] for e in slices)
    assert written["otherData"]["megamoe"]["runs"][0]["hidden_percent"] == 0
    again = Timeline.load(tmp_path / "trace.json")
    assert sorted(again.events, key=str) == sorted(timeline.events, key=str)
    assert again.hosts == timeline.hosts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"cannot read a trace from .*trace\.json: No such file or directory$"),
        ("{", "cannot read a trace"),
        ("[1]", "no trace that megamoe wrote"),
        ('{"traceEvents": []}', "no trace that megamoe wrote: it has no 'otherData'"),
        ('{"traceEvents": [], "otherData": {"megamoe": {"hosts": {}}}}', "holds no event"),
    ],
    ids=["missing", "truncated", "list", "of-another-program", "empty"],
)
def test_a_file_that_is_no_trace_is_refused_with_exit_code_2(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said):
        Timeline.load(path)
    done = command("timeline", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "wrong request" in done.stderr


def two_runs() -> Timeline:
    serial = [event(CALL, 0, 40, layer="serial"), event("dispatch", 0, 10, layer="serial")]
    serial += [event("linear-1", 10, 40, layer="serial")]
    waves = [event("dispatch", 50 + 5 * w, 55 + 5 * w, wave=w, layer="overlapped") for w in range(2)]
    work = [event("linear-1", 55 + 5 * w, 60 + 5 * w, wave=w, layer="overlapped") for w in range(2)]
    return Timeline({0: "here"}, (*serial, event(CALL, 50, 70, layer="overlapped"), *waves, *work))


def test_runs_are_drawn_from_the_same_left_edge_and_to_the_same_scale() -> None:
    lines = [line.plain for line in drawn(two_runs(), 51)]  # 40 columns of a millisecond
    assert lines[0] == "serial: 40.0 ms, a column is 1.00 ms"
    assert lines[2] == "  dispatch " + "0" * 10 + " " * 30
    assert lines[3] == "  linear-1 " + " " * 10 + "0" * 30
    assert lines[9] == "overlapped: 20.0 ms, a column is 1.00 ms"
    assert lines[10] == "rank 0 on here: 50.0 % hidden"
    assert lines[11] == "  dispatch " + "0" * 5 + "1" * 5 + " " * 30
    assert lines[12] == "  linear-1 " + " " * 5 + "0" * 5 + "1" * 5 + " " * 25


def test_the_command_prints_a_table_json_and_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    two_runs().save(tmp_path / "trace.json")
    table = command("timeline", tmp_path / "trace.json", "--svg", tmp_path / "out.svg", "--title", "Two runs")
    assert table.returncode == 0, table.stderr
    assert "overlapped: 20.0 ms" in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 80
    figure = (tmp_path / "out.svg").read_text()
    assert all(word in figure for word in (*FORWARD, "Two runs", "serial: 40 ms, 0.0 % of communication hidden"))
    assert "gradient" not in figure  # there was no backward
    rows = json.loads(command("timeline", tmp_path / "trace.json", "--format", "json").stdout)
    assert [(row["layer"], row["rank"], row["hidden_percent"]) for row in rows] == [
        ("serial", 0, 0.0),
        ("serial", None, 0.0),
        ("overlapped", 0, 50.0),
        ("overlapped", None, 50.0),
    ]


def test_a_figure_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    two_runs().save(tmp_path / "trace.json")
    for name in ("out.xyz", "out"):
        said = refused("timeline", tmp_path / "trace.json", "--svg", tmp_path / name)
        assert "a figure's name ends in .svg, .png or .pdf" in said
