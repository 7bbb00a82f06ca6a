"""Who is replaced after a batch that failed, and what is told: every mixture of what ranks can come to."""

from __future__ import annotations

import math
import pickle
import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from megamoe.launch.cluster import recovery
from megamoe.launch.cluster.recovery import RestartPolicy, StuckError, collect, judge, parse_elastic
from megamoe.launch.cluster.worker_handle import WorkerLostError
from megamoe.launch.process import portable
from megamoe.parallel.errors import PeerError

OK = "a result"
BOOM = RuntimeError("boom")
WRONG = ValueError("token 500 is outside")
STUCK = StuckError("rank 1 did not come back")


def lost(rank: int, condition: str = "dead") -> PeerError:
    return PeerError(rank, "there", "dispatch", "layers.0", 0, 1.0, 5.0, "connection reset", condition, "is lost")


def gone(number: int) -> WorkerLostError:
    return WorkerLostError(number, f"worker {number} died")


def everyone(outcomes: list[Any], *dead: int) -> dict[int, bool]:
    return {rank: rank not in dead for rank in range(len(outcomes))}


# ---- judge ----


def test_a_batch_of_results_is_no_failure() -> None:
    assert judge([OK, OK], everyone([OK, OK])) is None
    assert judge([OK, OK], everyone([OK, OK], 1)) is None  # it died after its answer: the next batch will tell


@pytest.mark.parametrize(
    ("outcomes", "replace", "told"),
    [
        ([lost(2), OK, gone(2), lost(2)], (2,), 0),
        ([gone(0), gone(1)], (0, 1), 0),
        ([gone(0), lost(0), gone(2)], (0, 2), 1),
        ([lost(1, "stalled"), STUCK, lost(1, "stalled")], (1,), 0),
        ([OK, STUCK, OK], (1,), 1),
        ([lost(1, "stopped"), STUCK, gone(2)], (1, 2), 0),
        ([lost(1, "raised"), BOOM, lost(1, "raised")], (1,), 1),
        ([BOOM, BOOM, OK], (0, 1), 0),
        ([RuntimeError("reset by peer"), gone(1), RuntimeError("reset by peer")], (1,), 1),
        ([lost(0), gone(1), lost(0)], (1,), 1),
        ([WRONG, gone(1)], (1,), 1),
        ([lost(2), lost(2), lost(2, "cut off")], (2,), 0),
        ([lost(1, "slow"), lost(2, "slow"), lost(1, "slow")], (1,), 0),
        ([lost(1), lost(0)], (1,), 0),
        ([lost(2, "unreachable"), OK, OK], (2,), 0),
    ],
    ids=[
        "gone_and_named",
        "all_gone",
        "two_gone_one_named",
        "stuck_and_named",
        "stuck_alone",
        "stuck_and_gone",
        "raised_its_own_and_named",
        "two_raised_their_own",
        "own_errors_of_a_gone_rank",
        "gone_and_another_named",
        "wrong_but_one_is_gone",
        "cut_off_names_itself",
        "most_name_it",
        "each_names_the_other",
        "named_but_it_came_to_a_result",
    ],
)
def test_who_is_replaced_and_what_is_told(outcomes: list[Any], replace: tuple[int, ...], told: int) -> None:
    failure = judge(outcomes, everyone(outcomes))
    assert failure is not None
    assert (failure.replace, failure.retry) == (replace, True)
    assert failure.error is outcomes[told]


def test_a_dead_process_is_replaced_though_its_answer_came() -> None:
    failure = judge([OK, lost(0)], {0: False, 1: True})
    assert failure is not None
    assert failure.replace == (0,)
    assert isinstance(failure.error, PeerError)
    failure = judge([OK, BOOM], {0: False, 1: True})
    assert failure is not None
    assert (failure.replace, failure.error) == ((0,), BOOM)


@pytest.mark.parametrize("outcomes", [[WRONG, WRONG], [OK, WRONG], [lost(1, "raised"), WRONG], [BOOM, WRONG]], ids=str)
def test_a_wrong_request_replaces_nobody_and_is_not_tried_again(outcomes: list[Any]) -> None:
    failure = judge(outcomes, everyone(outcomes))
    assert failure is not None
    assert (failure.replace, failure.retry, failure.error) == ((), False, WRONG)


def test_the_summary_is_one_line_that_names_the_rank() -> None:
    def summary(*outcomes: Any) -> str:
        failure = judge(outcomes, everyone(list(outcomes)))
        assert failure is not None
        return failure.summary

    assert summary(OK, RuntimeError("boom\nand more")) == "rank 1 raised RuntimeError: boom"
    assert summary(lost(1), gone(1)).startswith("rank 1 on there is lost: layer 'layers.0', wave 0, phase dispatch")
    assert summary(OK, gone(1)) == "worker 1 died"


# ---- collect ----


def ended(outcome: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
    return future


def test_outcomes_are_results_and_exceptions_in_order_of_rank() -> None:
    outcomes = [OK, BOOM, lost(1)]
    assert collect([ended(each) for each in outcomes], "forward", within_s=1.0, patience_s=1.0) == outcomes


def test_who_does_not_answer_is_stuck_and_named() -> None:
    found = collect([ended(OK), Future()], "forward", within_s=0.05, patience_s=9.0)
    assert found[0] == OK
    assert isinstance(found[1], StuckError)
    assert str(found[1]) == "rank 1 did not come back from forward"


@pytest.mark.parametrize(("others", "patience_s"), [([lost(1)], 60.0), ([BOOM], 0.05)], ids=["named", "unnamed"])
def test_after_a_failure_a_rank_that_is_named_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, others: list[Any], patience_s: float
) -> None:
    monkeypatch.setattr(recovery, "NAMED_S", 0.05)
    begun = time.monotonic()
    found = collect([ended(others[0]), Future()], "forward", within_s=60.0, patience_s=patience_s)
    assert time.monotonic() - begun < 5.0
    assert isinstance(found[1], StuckError)


def test_after_a_failure_a_rank_that_is_not_named_has_time_to_say_what_it_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "NAMED_S", 0.01)
    late: Future[Any] = Future()
    timer = threading.Timer(0.1, late.set_result, [OK])
    timer.start()
    assert collect([ended(BOOM), late], "forward", within_s=60.0, patience_s=60.0) == [BOOM, OK]
    timer.join()


# ---- policy ----


def test_each_further_restart_in_a_row_waits_twice_as_long_and_thirty_seconds_at_most() -> None:
    policy = RestartPolicy(restarts=9, backoff_s=0.5)
    assert [policy.wait_s(number) for number in range(1, 8)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert policy.wait_s(10_000) == 30.0
    assert RestartPolicy(backoff_s=0.0).wait_s(5) == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"restarts": -1}, "^restarts must be an integer of 0 or more, got -1$"),
        ({"restarts": "3"}, "^restarts must be an integer of 0 or more, got '3'$"),
        ({"backoff_s": None}, "^backoff_s must be 0 or more and finite, got None$"),
        ({"elastic": 3}, "1 <= least <= most, got 3"),
        ({"elastic": "2:4"}, "1 <= least <= most, got '2:4'"),
        ({"backoff_s": -0.1}, "^backoff_s must be 0 or more and finite, got -0.1$"),
        ({"retry_s": 0.0}, "^retry_s must be positive and finite, got 0.0$"),
        ({"elastic": (0, 4)}, r"1 <= least <= most, got \(0, 4\)"),
        ({"elastic": (3, 2)}, r"1 <= least <= most, got \(3, 2\)"),
        ({"elastic": (1, 2, 3)}, r"1 <= least <= most, got \(1, 2, 3\)"),
        ({"elastic": (1, 2.5)}, r"1 <= least <= most, got \(1, 2.5\)"),
        ({"backoff_s": math.inf}, "^backoff_s must be 0 or more and finite, got inf$"),
        ({"retry_s": math.inf}, "^retry_s must be positive and finite, got inf$"),
    ],
)
def test_a_wrong_policy_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RestartPolicy(**arguments)
    assert RestartPolicy(restarts=0, elastic=(2, 2)).elastic == (2, 2)


def test_elastic_is_written_min_colon_max() -> None:
    assert parse_elastic("2:4") == (2, 4)
    for text in ("", "2", "2:", ":4", "2:4:6", "-1:4", "a:b", "2.5:4", "2 : 4"):
        with pytest.raises(ValueError, match="elastic must be MIN:MAX, such as 2:4"):
            parse_elastic(text)


def test_an_error_about_a_peer_keeps_its_notes_on_the_way() -> None:
    there = pickle.loads(pickle.dumps(portable(lost(3), "worker 1")))
    assert (there.rank, there.condition, str(there)) == (3, "dead", str(lost(3)))
    assert "raised on worker 1" in there.__notes__[0]
    assert not hasattr(pickle.loads(pickle.dumps(lost(3))), "__notes__")
