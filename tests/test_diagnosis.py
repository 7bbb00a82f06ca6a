"""Who is named: every case by hand, and for any picture a rank that is in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamoe.parallel.health.diagnosis import PeerStatus, diagnose
from megamoe.parallel.health.status import LEFT, OUTSIDE, RAISED, WAITING, WORKING, RankStatus


def waits(rank: int, peer: int | None, age_s: float = 2.0) -> PeerStatus:
    return PeerStatus(rank, f"h{rank}", RankStatus(WAITING, "moe", 3, 1, "dispatch", peer, 9, age_s), 0.1)


def works(rank: int, age_s: float = 2.0) -> PeerStatus:
    return PeerStatus(rank, f"h{rank}", RankStatus(WORKING, "moe", 3, 1, "linear-1", None, 9, age_s), 0.1)


def outside(rank: int) -> PeerStatus:
    return PeerStatus(rank, f"h{rank}", RankStatus(OUTSIDE, "moe", 2, None, "", None, 9, 2.0), 0.1)


def raised(rank: int, complaint: str, peer: int | None = None, age_s: float = 0.1) -> PeerStatus:
    return PeerStatus(rank, f"h{rank}", RankStatus(RAISED, "moe", 3, 1, "linear-1", peer, 9, age_s, complaint), 0.1)


def gone(status: PeerStatus) -> PeerStatus:
    return replace(status, closed=True)


def silent(status: PeerStatus, reachable: bool) -> PeerStatus:
    return replace(status, heard_s=3.0, silent=True, reachable=reachable)


def hears_not(rank: int, peer: int) -> PeerStatus:
    return replace(waits(rank, peer), unheard=(peer,))


# what rank 0 sees, whom it waited for, whom it names and why
CASES = {
    "the rank it waits for is gone": ([waits(0, 1), gone(works(1)), waits(2, 1)], 1, 1, "dead"),
    "another than it waits for is gone": ([waits(0, 2), gone(works(1)), waits(2, 1)], 2, 1, "dead"),
    "its host answers, it does not": ([waits(0, 1), silent(works(1), True), hears_not(2, 1)], 1, 1, "stopped"),
    "its host does not answer": ([waits(0, 1), silent(works(1), False), hears_not(2, 1)], 1, 1, "unreachable"),
    "nobody answers": ([waits(0, 1), silent(works(1), False), silent(works(2), False)], 1, 0, "cut off"),
    "nobody speaks": ([waits(0, 1), silent(works(1), True), silent(works(2), True)], 1, 0, "cut off"),
    "of two, the other does not answer": ([waits(0, 1), silent(works(1), False)], 1, 1, "unreachable"),
    "it raised": ([waits(0, 2), raised(1, "KeyError: 'x'"), waits(2, 1)], 2, 1, "raised"),
    "it works on and on": ([waits(0, 1), works(1), waits(2, 1)], 1, 1, "stalled"),
    "it waits for one that works on and on": ([waits(0, 1), waits(1, 2), works(2)], 1, 2, "stalled"),
    "it has not called": ([waits(0, 1), outside(1), waits(2, 1)], 1, 1, "absent"),
    "it waits for one that has not called": ([waits(0, 1), waits(1, 2), outside(2)], 1, 2, "absent"),
    "a peer found out first": ([waits(0, 1), raised(1, "stopped", peer=2), waits(2, 1)], 1, 2, "stopped"),
    "the first of two that found out": (
        [waits(0, 1), raised(1, "slow", peer=0, age_s=0.1), raised(2, "absent", peer=1, age_s=0.3)],
        1,
        1,
        "absent",
    ),
    "one raised by itself, one about it": (
        [waits(0, 2), raised(1, "OSError: full"), raised(2, "raised", peer=1, age_s=0.5)],
        2,
        1,
        "raised",
    ),
    "two wait for each other": ([waits(0, 1), waits(1, 0)], 1, 1, "slow"),
    "all wait, one is in every wait": ([waits(0, 1), waits(1, 2), waits(2, 1)], 2, 1, "slow"),
    "all wait in a ring, one's answers are late": (
        [
            replace(waits(0, 1), answers=((2, 0.06), (1, 0.001))),
            replace(waits(1, 2), answers=((2, 0.05),)),
            waits(2, 0),
        ],
        1,
        2,
        "slow",
    ),
    "a silent rank that another hears is behind a bad link": (
        [
            replace(waits(0, 1), unheard=(1,)),
            silent(waits(1, 0), True),
            replace(waits(2, 1), answers=((0, 0.001), (1, 0.4))),
        ],
        1,
        1,
        "slow",
    ),
}


@pytest.mark.parametrize(("statuses", "awaited", "rank", "condition"), CASES.values(), ids=CASES.keys())
def test_the_rank_to_blame_is_named(statuses: list[PeerStatus], awaited: int, rank: int, condition: str) -> None:
    verdict = diagnose(0, awaited, statuses)
    assert (verdict.rank, verdict.condition) == (rank, condition)
    assert verdict.meaning


def test_a_rank_that_left_is_named_by_those_that_wait_for_it() -> None:
    left = PeerStatus(1, "h1", RankStatus(LEFT, "moe", 2, None, "", None, 9, 1.0), 1.0, closed=True)
    assert diagnose(0, 1, [waits(0, 1), left]).condition == "left"


@st.composite
def pictures(draw: st.DrawFn) -> tuple[list[PeerStatus], int]:
    """Any picture of 2 to 5 ranks that rank 0 could have, and a rank that it waits for"""
    size = draw(st.integers(2, 5))
    statuses = []
    for rank in range(size):
        state = draw(st.sampled_from([OUTSIDE, WORKING, WAITING, RAISED, LEFT]))
        peers = st.sampled_from([peer for peer in range(size) if peer != rank])
        position = RankStatus(state, "moe", 1, 0, "dispatch", draw(st.none() | peers), 1, 1.0, "stopped")
        known = draw(st.none() | st.just(position))
        silent, closed, reachable = draw(st.booleans()), draw(st.booleans()), draw(st.none() | st.booleans())
        statuses.append(PeerStatus(rank, "h", known, 2.0, silent, closed, reachable))
    return statuses, draw(st.integers(1, size - 1))


@given(pictures())
def test_any_picture_has_a_verdict_about_a_rank_in_it(picture: tuple[list[PeerStatus], int]) -> None:
    statuses, awaited = picture
    verdict = diagnose(0, awaited, statuses)
    assert 0 <= verdict.rank < len(statuses)
    assert verdict.meaning
    assert all(str(status).startswith(f"rank {status.rank} on h") for status in statuses)
