"""A model of node-limited dispatch: ranks as programs of steps, sockets as queues, and the orders in which all can run.

A rank's call is: put a page into each peer's place and wait for all pages; for each wave, the next one before the one
that it computes: post receives for the rows of each rank of another host and for the word behind them, send its rows
and the word; compute a wave: wait for its own rows, wait for the words at the other ranks of its host, read their rows.
In the end wait for its own words.

A socket is as gloo has it: posting a receive announces it to the sender, in order; a send is queued when both it and
the announcement are there, and what is queued arrives in order. Announcing and arriving are steps of nobody's program,
which may happen at any later time. What a place holds is the number of the call that wrote it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.protocol import Found

FAULTS = (
    "word before rows",
    "word received before rows",
    "no pages",
    "word of any call",
    "word not sent",
    "receives posted after waiting",
)

Step = tuple[str, str, int, int]  # kind, place, owner of the memory or rank at the other end, value
# announcements on their way, announced at the sender, sent and not announced, arriving: (place, call), oldest first
Channel = tuple[tuple[tuple[str, int], ...], ...]
State = tuple[tuple[int, ...], tuple[int, ...], tuple[Channel, ...]]
_EMPTY: Channel = ((), (), (), ())


@dataclass(frozen=True, slots=True)
class Case:
    """Ranks of each host, calls, and waves of a call."""

    sizes: tuple[int, ...]
    calls: int
    waves: int = 1

    @property
    def nodes(self) -> list[int]:
        return [node for node, size in enumerate(self.sizes) for _ in range(size)]

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.sizes))} ranks, {self.calls} calls, {self.waves} waves"


def program(case: Case, rank: int, fault: str = "") -> list[Step]:
    """The steps of a rank, in its own order."""
    nodes = case.nodes
    peers = [peer for peer in range(len(nodes)) if peer != rank]
    mates = [peer for peer in peers if nodes[peer] == nodes[rank]]
    far = [peer for peer in peers if peer not in mates]
    receivers = [peer for peer in far if nodes.count(nodes[peer]) > 1]
    senders = far if mates else []
    steps: list[Step] = []

    def dispatch(wave: int, call: int) -> None:
        for sender in senders:
            posts = [("post", f"rows{wave}<{sender}", sender, call), ("post", f"word{wave}<{sender}", sender, call)]
            steps.extend(reversed(posts) if fault == "word received before rows" else posts)
        for receiver in receivers:
            sends = [("send", f"rows{wave}<{rank}", receiver, call), ("send", f"word{wave}<{rank}", receiver, call)]
            if fault == "word not sent" and call == case.calls:
                sends.pop()
            steps.extend(reversed(sends) if fault == "word before rows" else sends)

    def compute(wave: int, call: int) -> None:
        for sender in senders:
            steps.append(("wait", f"rows{wave}<{sender}", rank, call))
            for mate in mates:
                kind = "any" if fault == "word of any call" else "wait"
                steps.append((kind, f"word{wave}<{sender}", mate, call))
                steps.append(("read", f"rows{wave}<{sender}", mate, call))

    for call in range(1, case.calls + 1):
        if fault != "no pages":
            steps += [("write", f"page{call % 2}<{rank}", peer, call) for peer in peers]
            steps += [("wait", f"page{call % 2}<{peer}", rank, call) for peer in peers]
        late = fault == "receives posted after waiting"
        if late:
            steps += [("wait", f"word0<{sender}", mate, call) for sender in senders for mate in mates]
        dispatch(0, call)
        for wave in range(case.waves):
            if wave + 1 < case.waves:
                dispatch(wave + 1, call)
            compute(wave, call)
        steps += [("wait", f"word{wave}<{sender}", rank, call) for wave in range(case.waves) for sender in senders]
    return steps


class Model:
    """All that can happen in a state, and what it leads to."""

    def __init__(self, case: Case, fault: str = "") -> None:
        nodes = case.nodes
        self.programs = [program(case, rank, fault) for rank in range(len(nodes))]
        owners = {
            (place, owner)
            for rank, steps in enumerate(self.programs)
            for kind, place, owner, _ in steps
            for owner in [rank if kind == "post" else owner]
        }
        self._place = {each: number for number, each in enumerate(sorted(owners))}
        pairs = [(s, r) for s in range(len(nodes)) for r in range(len(nodes)) if nodes[s] != nodes[r]]
        self._channel = {pair: number for number, pair in enumerate(pairs)}
        self._receiver = [receiver for _, receiver in pairs]

    def begin(self) -> State:
        return (0,) * len(self.programs), (0,) * len(self._place), (_EMPTY,) * len(self._channel)

    def after(self, state: State) -> Iterator[State | str]:
        """States that one step leads to; a text says what has gone wrong."""
        at, memory, channels = state
        for rank, steps in enumerate(self.programs):
            if at[rank] < len(steps):
                moved = self._run(rank, steps[at[rank]], memory, channels)
                if isinstance(moved, str):
                    yield moved
                elif moved is not None:
                    yield (*at[:rank], at[rank] + 1, *at[rank + 1 :]), *moved
        for number, (announcing, announced, sent, arriving) in enumerate(channels):
            if announcing:
                head, *rest = announcing
                channel = self._match(tuple(rest), (*announced, head), sent, arriving)
                yield at, memory, _with(channels, number, channel)
            if arriving:
                (place, call), *rest = arriving
                where = self._place[place, self._receiver[number]]
                channel = (announcing, announced, sent, tuple(rest))
                yield at, (*memory[:where], call, *memory[where + 1 :]), _with(channels, number, channel)

    def _run(
        self, rank: int, step: Step, memory: tuple[int, ...], channels: tuple[Channel, ...]
    ) -> tuple[tuple[int, ...], tuple[Channel, ...]] | str | None:
        """Memory and channels after a rank's step; None where it cannot be taken yet."""
        kind, place, other, value = step
        if kind == "post":
            number = self._channel[other, rank]
            announcing, *rest = channels[number]
            return memory, _with(channels, number, ((*announcing, (place, value)), *rest))
        if kind == "send":
            number = self._channel[rank, other]
            announcing, announced, sent, arriving = channels[number]
            return memory, _with(
                channels, number, self._match(announcing, announced, (*sent, (place, value)), arriving)
            )
        where = self._place[place, other]
        if kind == "write":
            return (*memory[:where], value, *memory[where + 1 :]), channels
        if kind == "read" and memory[where] != value:
            return f"rank {rank} read call {memory[where]} in place of {value} from {place} at rank {other}"
        waits = (kind == "wait" and memory[where] != value) or (kind == "any" and not memory[where])
        return None if waits else (memory, channels)

    @staticmethod
    def _match(*channel: tuple[tuple[str, int], ...]) -> Channel:
        """Queues what is both sent and announced."""
        announcing, announced, sent, arriving = channel
        for each in [each for each in sent if each in announced]:
            announced = tuple(other for other in announced if other != each)
            sent = tuple(other for other in sent if other != each)
            arriving = (*arriving, each)
        return announcing, announced, sent, arriving

    def stuck(self, state: State) -> str:
        """Who stands still where nothing more can happen; "" where all have come to their ends."""
        at = state[0]
        left = [f"rank {r}: {steps[at[r]]}" for r, steps in enumerate(self.programs) if at[r] < len(steps)]
        return f"nobody can go on: {'; '.join(left)}" if left else ""


def _with(channels: tuple[Channel, ...], number: int, channel: Channel) -> tuple[Channel, ...]:
    return (*channels[:number], channel, *channels[number + 1 :])


def search(case: Case, fault: str = "") -> Found:
    """Runs all orders."""
    model = Model(case, fault)
    begin = model.begin()
    seen, ahead = {begin}, [begin]
    while ahead:
        state = ahead.pop()
        moved = False
        for after in model.after(state):
            if isinstance(after, str):
                return Found(len(seen), after)
            moved = True
            if after not in seen:
                seen.add(after)
                ahead.append(after)
        wrong = "" if moved else model.stuck(state)
        if wrong:
            return Found(len(seen), wrong)
    return Found(len(seen), "")


def walk(case: Case, times: int, fault: str = "") -> Found:
    """Runs so many orders that are drawn."""
    model, rng, steps = Model(case, fault), random.Random(0), 0
    for _ in range(times):
        state = model.begin()
        while choices := list(model.after(state)):
            steps += 1
            after = rng.choice(choices)
            wrong = [each for each in choices if isinstance(each, str)]
            if wrong:
                return Found(steps, wrong[0])
            assert not isinstance(after, str)
            state = after
        if model.stuck(state):
            return Found(steps, model.stuck(state))
    return Found(steps, "")
