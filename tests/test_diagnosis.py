"""Who is named: every case by hand, and for any picture a rank that is in it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.group import EPGroup
from megamoe.parallel.health.diagnosis import PeerStatus, Verdict, diagnose
from megamoe.parallel.health.status import LEFT, OUTSIDE, RAISED, WAITING, WORKING, OwnStatus, RankStatus
from megamoe.shape import MoEShape
from tests.cases import make_batch, make_layer


def waits(rank: int, peer: int | None, age_s: float = 2.0) -> PeerStatus:
    return PeerStatus(rank, f"h{rank}", RankStatus(WAITING, "moe", 3, 1, "dispatch", peer, 9, age_s), 0.1)


def works(rank: int, age_s: float = 2.0) -> PeerStatus:
    return PeerStatus(rank, f"h{rank}", RankStatus(WORKING, "moe", 3, 1, "linear-1", None, 9, age_s), 0.1)


def outside(rank: int) -> PeerStatus:
    return PeerStatus(rank, f"h{rank}", RankStatus(OUTSIDE, "moe", 2, None, "", None, 9, 2.0), 0.1)


def raised(rank: int, complaint: str, peer: int | None = None, age_s: float = 0.1) -> PeerStatus:
    return PeerStatus(rank, f"h{rank}", RankStatus(RAISED, "moe", 3, 1, "linear-1", peer, 9, age_s, complaint), 0.1)


def stuck(rank: int, peer: int, calls: int, phase: str, wave: int | None = None, age_s: float = 2.0) -> PeerStatus:
    position = RankStatus(WAITING, "moe", calls, wave, phase, peer, 9, age_s, calls=calls)
    return PeerStatus(rank, f"h{rank}", position, 0.1)


def between(rank: int, peer: int, calls: int) -> PeerStatus:
    status = stuck(rank, peer, calls, "counts")
    assert status.position
    return replace(status, position=replace(status.position, between=True))


def after(rank: int, calls: int, age_s: float = 2.0) -> PeerStatus:
    return PeerStatus(rank, f"h{rank}", RankStatus(OUTSIDE, "moe", calls, age_s=age_s, calls=calls), 0.1)


def gave_up(status: PeerStatus, looked_s: float) -> PeerStatus:
    assert status.position
    return replace(status, position=replace(status.position, looked_s=looked_s))


def far(status: PeerStatus, *answers: tuple[int, float]) -> PeerStatus:
    return replace(status, answers=answers)


def near(status: PeerStatus, *ranks: int) -> PeerStatus:
    """One that shares memory with these ranks, with rank 0 if none is given."""
    return replace(status, near=ranks or (0,))


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
    "of two, the other found that this one is behind a slow link": (
        [waits(0, 1), raised(1, "slow", peer=0)],
        1,
        1,
        "slow",
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
    "all wait in a ring, the one of another host answers late": (
        [
            far(near(waits(0, 1), 1), (2, 0.06), (1, 0.001)),
            far(near(waits(1, 2), 0), (2, 0.05)),
            waits(2, 0),
        ],
        1,
        2,
        "slow",
    ),
    "all wait in a ring on one host, which is busy": (
        [
            far(near(waits(0, 1), 1, 2), (2, 0.06), (1, 0.001)),
            far(near(waits(1, 2), 0, 2), (2, 0.05)),
            near(waits(2, 0), 0, 1),
        ],
        1,
        1,
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

BUSY = PeerStatus(2, "h2", RankStatus(WORKING, "moe", 8, 1, "linear-1", age_s=2.0, calls=8), 0.1)
# the same, where messages do not arrive: all have begun call 8, and some of them call 9
CASES |= {
    "all wait for one that is a call ahead of them": (
        [stuck(0, 1, 9, "counts"), stuck(1, 0, 8, "combine", 0), stuck(2, 0, 8, "combine", 0)],
        1,
        0,
        "undelivered",
    ),
    "one that is a call ahead is waited for, another still works": (
        [stuck(0, 1, 8, "combine", 0), stuck(1, 2, 9, "counts"), BUSY],
        1,
        1,
        "undelivered",
    ),
    "one that is ahead within the call": (
        [stuck(0, 1, 8, "dispatch", 2), stuck(1, 0, 8, "combine", 1), stuck(2, 1, 8, "dispatch", 2)],
        1,
        1,
        "undelivered",
    ),
    "one has ended the call and does other things": (
        [stuck(0, 1, 8, "combine", 0), after(1, 8), stuck(2, 1, 8, "combine", 0)],
        1,
        1,
        "undelivered",
    ),
    "one has ended the call and waits for the others between calls": (
        [stuck(0, 1, 8, "combine", 0), between(1, 0, 8), stuck(2, 1, 8, "combine", 0)],
        1,
        1,
        "undelivered",
    ),
    "answers are late as well, but two miss the same rank's messages": (
        [
            far(stuck(0, 2, 8, "combine", 0), (1, 0.06), (2, 0.001)),
            far(stuck(1, 2, 8, "combine", 0), (2, 0.05)),
            stuck(2, 0, 9, "counts"),
        ],
        2,
        2,
        "undelivered",
    ),
    "of two, the other is ahead": ([stuck(0, 1, 8, "combine", 0), stuck(1, 0, 9, "counts")], 1, 1, "undelivered"),
    "of two, this one is ahead": ([stuck(0, 1, 9, "counts"), stuck(1, 0, 8, "combine", 0)], 1, 0, "undelivered"),
    "of two on a slow link, this one is ahead": (
        [far(stuck(0, 1, 9, "counts"), (1, 0.05)), stuck(1, 0, 8, "combine", 0)],
        1,
        1,
        "slow",
    ),
    "of two that share memory, on a machine that is busy, this one is ahead": (
        [far(stuck(0, 1, 9, "counts"), (1, 0.05)), near(stuck(1, 0, 8, "combine", 0))],
        1,
        0,
        "undelivered",
    ),
    "of two that share memory, the other hardly runs and has not seen what came": (
        [far(stuck(0, 1, 9, "counts"), (1, 0.4)), near(stuck(1, 0, 8, "combine", 0))],
        1,
        1,
        "slow",
    ),
    "one misses what its neighbour left in its memory, on a machine so busy that one's answers are late": (
        [
            far(near(stuck(0, 2, 9, "counts"), 1), (1, 0.03), (2, 0.03), (3, 0.03)),
            near(stuck(1, 2, 9, "counts")),
            near(stuck(2, 3, 8, "combine", 0), 3),
            near(stuck(3, 2, 9, "counts"), 2),
        ],
        2,
        3,
        "undelivered",
    ),
    "one misses what its neighbour has left in its memory only just": (
        [
            near(stuck(0, 2, 9, "counts"), 1),
            near(stuck(1, 2, 9, "counts")),
            near(gave_up(stuck(2, 3, 8, "combine", 0), 0.2), 3),
            near(stuck(3, 2, 9, "counts", age_s=0.6), 2),
        ],
        2,
        3,
        "undelivered",
    ),
    "one misses what its neighbour left in its memory, and hardly runs": (
        [
            far(near(stuck(0, 2, 9, "counts"), 1), (2, 0.5), (3, 0.01)),
            far(near(stuck(1, 2, 9, "counts")), (0, 0.01), (3, 0.01)),
            far(near(stuck(2, 3, 8, "combine", 0), 3), (0, 0.5), (1, 0.5), (3, 0.5)),
            near(stuck(3, 2, 9, "counts"), 2),
        ],
        2,
        2,
        "slow",
    ),
    "of two, this one has only just gone ahead": (
        [stuck(0, 1, 9, "counts", age_s=0.5), stuck(1, 0, 8, "combine", 0)],  # heard of 0.1 s ago
        1,
        1,
        "slow",
    ),
    "one waits for what came while it asked who is to blame": (
        [stuck(0, 1, 8, "combine", 1, 0.6), gave_up(stuck(1, 0, 8, "dispatch", 1), 0.7), stuck(2, 1, 8, "combine", 1)],
        1,
        1,
        "slow",
    ),
    "one message of a rank behind a slow link is missing": (
        [
            far(stuck(0, 2, 9, "counts"), (2, 0.06), (1, 0.001)),
            far(stuck(1, 2, 9, "counts"), (2, 0.05)),
            stuck(2, 0, 8, "combine", 1),
        ],
        2,
        2,
        "slow",
    ),
    "each misses the other's, so neither is ahead": (
        [stuck(0, 1, 8, "combine", 0), stuck(1, 0, 8, "combine", 0), stuck(2, 1, 9, "counts")],
        1,
        1,
        "slow",
    ),
    "a wait between calls is no wait in one": (
        [between(0, 1, 8), stuck(1, 2, 8, "combine", 0), between(2, 1, 8)],
        1,
        2,
        "undelivered",
    ),
    "rows that do not leave are not awaited": (
        [stuck(0, 1, 8, "sending dispatch", 0), stuck(1, 0, 8, "combine", 1), stuck(2, 1, 9, "counts")],
        1,
        1,
        "slow",
    ),
    "one that has not called is behind": (
        [stuck(0, 1, 9, "counts"), after(1, 8), stuck(2, 1, 9, "counts")],
        1,
        1,
        "absent",
    ),
}


def test_a_rank_that_says_nothing_any_more_is_told_of_with_when_and_where_it_was_heard_last() -> None:
    nothing, stopped = PeerStatus(1, "h1", None, 0.5), silent(works(1), True)
    assert str(nothing) == "rank 1 on h1: nothing heard yet"
    assert str(gone(nothing)) == "rank 1 on h1: dead; not heard for 0.5 s; it never said anything"
    assert str(stopped) == f"rank 1 on h1: stopped; not heard for 3.0 s; last seen: {stopped.position}"


@pytest.mark.parametrize(("statuses", "awaited", "rank", "condition"), CASES.values(), ids=CASES.keys())
def test_the_rank_to_blame_is_named(statuses: list[PeerStatus], awaited: int, rank: int, condition: str) -> None:
    verdict = diagnose(0, awaited, statuses)
    assert (verdict.rank, verdict.condition) == (rank, condition)
    assert verdict.meaning


@pytest.mark.parametrize(
    ("case", "certain"),
    [
        ("all wait in a ring, one's answers are late", True),
        ("all wait, one is in every wait", False),
        ("two wait for each other", True),
        ("of two that share memory, on a machine that is busy, this one is ahead", False),
    ],
)
def test_of_ranks_that_wait_for_each_other_answers_say_for_certain_who_is_slow(case: str, certain: bool) -> None:
    statuses, awaited, *_ = CASES[case]
    assert diagnose(0, awaited, statuses).certain is certain


def test_a_rank_that_left_is_named_by_those_that_wait_for_it() -> None:
    left = PeerStatus(1, "h1", RankStatus(LEFT, "moe", 2, None, "", None, 9, 1.0), 1.0, closed=True)
    assert diagnose(0, 1, [waits(0, 1), left]).condition == "left"


# ---- messages that are lost, played ----

Message = tuple[int, str, int]  # call, phase, wave


def waves_of(call: int, num_waves: int) -> list[tuple[str, Message]]:
    """What a rank does in a call by waves, in order: a message of a kind goes to all others, or comes from them."""
    steps = [("send", (call, "counts", 0)), ("wait", (call, "counts", 0))]
    steps += [("send", (call, "dispatch", wave)) for wave in range(min(2, num_waves))]
    for wave in range(num_waves):
        steps += [("send", (call, "dispatch", wave + 2))] * (wave + 2 < num_waves)
        steps += [("wait", (call, "dispatch", wave)), ("send", (call, "combine", wave))]
    return steps + [("wait", (call, "combine", wave)) for wave in range(num_waves)]


def few_of(call: int) -> list[tuple[str, Message]]:
    """The same of a call of few tokens."""
    return [(what, (call, phase, 0)) for phase in ("counts", "combine") for what in ("send", "wait")]


def played(
    size: int,
    victim: int,
    num_waves: int,
    lost_from: int,
    unsent: set[tuple[Message, int, int]],
    lost_to: Collection[int] = range(9),
) -> list[PeerStatus]:
    """Where ranks come to rest that call again and again, when all is lost that a victim sends from so many sends on.

    num_waves   0 for calls of few tokens
    unsent      (message, sender, receiver) of those that have no rows
    lost_to     receivers for which it is lost; others get it
    """
    calls = [waves_of(call, num_waves) if num_waves else few_of(call) for call in range(1, 9)]
    program = [step for call in calls for step in call]
    at, arrived, sent = [0] * size, set(unsent), 0

    def missing(rank: int) -> int | None:
        """The peer for whose message it waits."""
        message = program[at[rank]][1]
        peers = ((rank + distance) % size for distance in range(1, size))
        return next((peer for peer in peers if (message, peer, rank) not in arrived), None)

    moved = True
    while moved:
        moved = False
        for rank in range(size):
            what, message = program[at[rank]]
            if what == "send":
                lost = lost_to if rank == victim and sent >= lost_from else ()
                arrived |= {(message, rank, peer) for peer in range(size) if peer not in lost}
            if what == "send" or missing(rank) is None:
                sent += what == "send" and rank == victim
                at[rank], moved = at[rank] + 1, True
    found = []
    for rank in range(size):
        (call, phase, wave), peer = program[at[rank]][1], missing(rank)
        assert peer is not None
        found.append(stuck(rank, peer, call, phase, None if phase == "counts" else wave))
    return found


def all_verdicts(statuses: list[PeerStatus]) -> set[Verdict]:
    positions = [status.position for status in statuses]
    return {diagnose(rank, position.peer, statuses) for rank, position in enumerate(positions) if position}


@pytest.mark.parametrize("num_waves", [0, 1, 2, 5], ids=["few", "waves1", "waves2", "waves5"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_names_the_one_whose_messages_are_lost_wherever_that_begins(size: int, num_waves: int) -> None:
    of_a_call = sum(what == "send" for what, _ in (waves_of(1, num_waves) if num_waves else few_of(1)))
    for victim in range(size):
        for lost_from in range(of_a_call, 3 * of_a_call):
            statuses = played(size, victim, num_waves, lost_from, set())
            assert all_verdicts(statuses) == {Verdict(victim, "undelivered", certain=False)}, (victim, lost_from)


@pytest.mark.parametrize("num_waves", [0, 1, 2, 5], ids=["few", "waves1", "waves2", "waves5"])
@pytest.mark.parametrize("busy", range(4))
def test_signals_lost_within_a_host_are_their_senders_whosever_answers_are_late(busy: int, num_waves: int) -> None:
    """Four ranks on two hosts; what a rank signals to its neighbour is lost, what it sends to the other host is not."""
    of_a_call = sum(what == "send" for what, _ in (waves_of(1, num_waves) if num_waves else few_of(1)))
    for victim in range(4):
        for lost_from in range(of_a_call, 3 * of_a_call):
            statuses = [
                near(status, status.rank ^ 1)
                for status in played(4, victim, num_waves, lost_from, set(), lost_to=[victim ^ 1])
            ]
            statuses[busy] = far(statuses[busy], *((peer, 0.05) for peer in range(4) if peer != busy))
            assert all_verdicts(statuses) == {Verdict(victim, "undelivered", certain=False)}, (victim, lost_from)


@given(st.data())
def test_every_rank_names_it_where_some_ranks_have_no_rows_for_each_other(data: st.DataObject) -> None:
    size, num_waves = data.draw(st.integers(2, 4)), data.draw(st.integers(0, 4))
    victim, lost_from = data.draw(st.integers(0, size - 1)), data.draw(st.integers(2, 12))
    with_rows = [(phase, wave) for phase in ("dispatch", "combine") for wave in range(max(num_waves, 1))]
    kinds = [(phase, wave, a, b) for phase, wave in with_rows for a in range(size) for b in range(size) if a != b]
    empty = data.draw(st.sets(st.sampled_from(kinds)))
    unsent = {((call, phase, wave), a, b) for phase, wave, a, b in empty for call in range(1, 9)}
    statuses = played(size, victim, num_waves, lost_from, unsent)
    found = all_verdicts(statuses)
    assert len(found) == 1, statuses
    assert found.pop().rank == victim, statuses


class Noted(OwnStatus):
    """Keeps where a rank waits, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[RankStatus] = []

    def wait(self, phase: str, wave: int | None, peer: int | None) -> None:
        super().wait(phase, wave, peer)
        self.waits.append(self.position())


def waits_of_calls(group: EPGroup, num_tokens: int, shared_memory: bool) -> list[RankStatus]:
    """Where this rank waits in three calls, the exchanges before the first left out, and in an exchange after each."""
    shape = MoEShape(hidden=64, intermediate=32, num_experts=8, topk=3)
    noted = Noted()
    own = replace(EPGroup.of(dist.group.WORLD, shared_memory=shared_memory), own_status=noted)
    assert own.clock is not None
    own.clock.own_status = noted
    layer, batch = (
        make_layer(shape, own, waves=4 if num_tokens > 100 else "auto"),
        make_batch(shape, num_tokens, seed=group.rank),
    )
    for number in range(4):
        if number == 1:
            noted.waits.clear()
        layer(batch.hidden, batch.ids, batch.weights)
        own.wave_costs.clear()
        own.wave_cost("after the call", 1.0)
    return noted.waits


@pytest.mark.parametrize(
    ("num_tokens", "shared_memory"), [(400, True), (400, False), (5, True)], ids=["waves", "sockets", "few"]
)
def test_a_rank_is_never_past_where_it_waits_later(ranks: LocalRanks, num_tokens: int, shared_memory: bool) -> None:
    for waits in ranks.run(waits_of_calls, num_tokens, shared_memory, size=3):
        assert {wait.phase for wait in waits if not wait.phase.startswith("sending")} >= {"counts", "combine"}
        assert sum(wait.between for wait in waits) >= 3
        backwards = [(a, b) for n, a in enumerate(waits) for b in waits[n:] if a.is_past(b)]
        assert not backwards
        assert any(b.is_past(a) for n, a in enumerate(waits) for b in waits[n:] if a.calls == b.calls)


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
