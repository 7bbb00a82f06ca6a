"""A model of the mega-kernel's counters: ranks as programs of steps, and every order in which these can run.

A rank is a few programs side by side, as on a GPU, which take the tasks of `kernel.py` in turns. What a place holds is
the number of the call that wrote it, or of the block, so that what belongs to another is found by its number. The
counters are those of the kernel: words of counts in two places in turn, results told of by adding to `arrived`, blocks
of the ring by what was pulled and computed of them, all but the first cleared by the last program to leave. Faults can
be seeded, to see that the search finds them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.protocol import Found

FAULTS = (
    "lost signal",  # the last count that rank 0 pushes to its peer is not set
    "count before slots",  # the word of a count is set before the slots that it tells of
    "count before tokens",  # counts are pushed before the rank's own tokens are encoded
    "one place for counts",  # words do not take turns between calls
    "counts of any call",  # a word of an earlier call is taken for this one's
    "ring not waited for",  # a block is pulled before the one that lies in its place was computed
    "arrived before results",  # results are told of before they are there
    "not cleared",  # the last program leaves `arrived` as it is
    "reduce before all",  # a token is summed when one owner's results have come
    "pull waits for the next block",  # a wait for a task that comes later
)

# a step: (kind, place, owner of the memory, value); kinds:
#   set     the place becomes the value          add   the place grows by it
#   least   waits until it is that at least      read  it must be the value, else something is wrong
#   leave   grows; who makes it `value` clears the counters of the rank, and begins the next call
Step = tuple[str, str, int, int]


@dataclass(frozen=True, slots=True)
class Model:
    """ranks, programs of each, calls, blocks of each owner a call and blocks of the ring.

    Each rank sends every owner, itself included, a row in every block; in call `quiet` rank 0 sends none and gets none.
    """

    ranks: int
    programs: int = 1
    calls: int = 2
    blocks: int = 2
    ring: int = 2
    quiet: int = 0

    def senders(self, call: int) -> list[int]:
        return [rank for rank in range(self.ranks) if not (rank == 0 and call == self.quiet)]


def tasks(model: Model, rank: int, call: int, fault: str) -> Iterator[list[Step]]:
    """The tasks of a call in their order, each a list of steps."""
    senders, ranks = model.senders(call), range(model.ranks)
    place = "counts" if fault == "one place for counts" else f"counts{call % 2}"
    encode: list[Step] = [("set", "tokens", rank, call), ("add", "encoded", rank, 1)]
    wait: list[Step] = [("least", "encoded", rank, 1)]
    if fault != "count before tokens":
        yield encode
    for owner in ranks:
        told: Step = ("set", f"{place}<{rank}", owner, call)
        slots: list[Step] = [("set", f"slots<{rank}", owner, call)] if rank in senders else []
        if fault == "lost signal" and rank == 0 and call == model.calls and owner == model.ranks - 1:
            yield [*wait, *slots]
        elif fault == "count before slots":
            yield [*wait, told, *slots]
        elif fault == "count before tokens":
            yield [*slots, told]
        else:
            yield [*wait, *slots, told]
    if fault == "count before tokens":
        yield encode
    # a word has no rows where the sender is quiet, but tells that it is there
    least = 1 if fault == "counts of any call" else call
    counts: list[Step] = []
    for source in ranks:
        counts += [("least", f"{place}<{source}", rank, least), ("read", f"{place}<{source}", rank, call)]
    yield [*counts, ("add", "laid out", rank, 1)]
    laid_out: Step = ("least", "laid out", rank, 1)
    for block in range(model.blocks + 1):
        if block < model.blocks and senders:
            yield [laid_out, *_pull(model, rank, call, block, fault)]
        if block and senders:
            yield [laid_out, *_compute(model, rank, call, block - 1, fault)]
    if rank in senders:
        steps: list[Step] = []
        for owner in ranks:
            needed = 1 if fault == "reduce before all" and owner else model.blocks
            steps.append(("least", f"arrived<{owner}", rank, 0 if fault == "reduce before all" and owner else needed))
        steps += [("read", f"results<{owner}.{block}", rank, call) for owner in ranks for block in range(model.blocks)]
        yield steps


def _number(model: Model, call: int, block: int) -> int:
    """Of a block in all calls, from 1."""
    return call * model.blocks + block + 1


def _pull(model: Model, rank: int, call: int, block: int, fault: str) -> Iterator[Step]:
    """Waits until the block before in its place was computed, then reads slots and tokens."""
    slot, turn = block % model.ring, block // model.ring
    if fault != "ring not waited for":
        yield ("least", f"done{slot}", rank, turn)
    if fault == "pull waits for the next block":
        yield ("least", f"done{slot}", rank, turn + 1)
    for source in model.senders(call):
        yield ("read", f"slots<{source}", rank, call)
        yield ("read", "tokens", source, call)
    yield ("set", f"ring{slot}", rank, _number(model, call, block))
    yield ("add", f"pulled{slot}", rank, 1)


def _compute(model: Model, rank: int, call: int, block: int, fault: str) -> Iterator[Step]:
    """Linear-1 and Linear-2 of a block: reads its place of the ring, writes results to their homes, tells them."""
    slot, turn = block % model.ring, block // model.ring
    yield ("least", f"pulled{slot}", rank, turn + 1)
    yield ("read", f"ring{slot}", rank, _number(model, call, block))
    for home in model.senders(call):
        pushed: list[Step] = [("set", f"results<{rank}.{block}", home, call), ("add", f"arrived<{rank}", home, 1)]
        yield from reversed(pushed) if fault == "arrived before results" else pushed
    yield ("add", f"done{slot}", rank, 1)


def program(model: Model, rank: int, number: int, fault: str = "") -> list[Step]:
    """The steps of one program of a rank in all calls: every so-manieth task, then it leaves."""
    steps: list[Step] = []
    for call in range(1, model.calls + 1):
        mine = list(tasks(model, rank, call, fault))[number :: model.programs]
        steps += [step for task in mine for step in task]
        # a kernel begins when all programs of the one before have left
        steps += [("leave", "left", rank, model.programs), ("least", "calls", rank, call)]
    return steps


class _Machine:
    """States and steps: where each program is, and what memory holds."""

    def __init__(self, model: Model, fault: str) -> None:
        self.model, self.fault = model, fault
        self.names = [(rank, number) for rank in range(model.ranks) for number in range(model.programs)]
        self.programs = [program(model, rank, number, fault) for rank, number in self.names]
        places = {(step[1], step[2]) for steps in self.programs for step in steps}
        self.index = {place: number for number, place in enumerate(sorted(places))}
        counters = ("encoded", "laid out", "pulled", "done", "left", "arrived")
        self.cleared = {
            rank: [
                number for (name, owner), number in self.index.items() if owner == rank and name.startswith(counters)
            ]
            for rank in range(model.ranks)
        }
        if fault == "not cleared":
            kept = [number for (name, _), number in self.index.items() if name.startswith("arrived")]
            self.cleared = {rank: [each for each in found if each not in kept] for rank, found in self.cleared.items()}

    def begin(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (0,) * len(self.programs), (0,) * len(self.index)

    def advance(self, at: tuple[int, ...], memory: tuple[int, ...], who: int) -> tuple[tuple[int, ...], str] | None:
        """What memory holds after the next step of a program, and what went wrong; None where the program waits."""
        kind, place, owner, value = self.programs[who][at[who]]
        where = self.index[place, owner]
        if kind == "least":
            return (memory, "") if memory[where] >= value else None
        if kind == "read":
            rank, number = self.names[who]
            said = f"program {number} of rank {rank} read {memory[where]} in place of {value} from {place}"
            return memory, "" if memory[where] == value else said
        found = list(memory)
        found[where] = value if kind == "set" else memory[where] + 1 if kind == "leave" else memory[where] + value
        if kind == "leave" and found[where] == value:
            for each in self.cleared[owner]:
                found[each] = 0
            found[self.index["calls", owner]] += 1
        return tuple(found), ""

    def stuck(self, at: tuple[int, ...]) -> str:
        waiting = [
            f"program {number} of rank {rank}: {steps[place]}"
            for (rank, number), steps, place in zip(self.names, self.programs, at, strict=True)
            if place < len(steps)
        ]
        return f"nobody can go on: {'; '.join(waiting)}" if waiting else ""


def search(model: Model, fault: str = "") -> Found:
    """Runs all orders of the programs' steps, each step at once and for all to see.

    Steps that touch one program's memory alone are taken at once: they commute with all others.
    """
    machine = _Machine(model, fault)
    begin = machine.begin()
    seen, ahead = {begin}, [begin]
    while ahead:
        at, memory = ahead.pop()
        moved = False
        for who, steps in enumerate(machine.programs):
            if at[who] == len(steps):
                continue
            after = machine.advance(at, memory, who)
            if after is None:
                continue
            moved = True
            if after[1]:
                return Found(len(seen), after[1])
            state = ((*at[:who], at[who] + 1, *at[who + 1 :]), after[0])
            if state not in seen:
                seen.add(state)
                ahead.append(state)
        if not moved and machine.stuck(at):
            return Found(len(seen), machine.stuck(at))
    return Found(len(seen), "")


def wander(model: Model, runs: int, fault: str = "", seed: int = 0) -> Found:
    """Runs some orders of the steps, drawn at random: half of them let one program go on as long as it can."""
    machine, rng, steps_taken = _Machine(model, fault), random.Random(seed), 0
    for run in range(runs):
        at, memory = machine.begin()
        last = 0
        while True:
            ready = [who for who, steps in enumerate(machine.programs) if at[who] < len(steps)]
            able = {who: after for who in ready if (after := machine.advance(at, memory, who)) is not None}
            if not able:
                break
            who = last if run % 2 and last in able and rng.random() < 0.9 else rng.choice(list(able))
            memory, wrong = able[who]
            steps_taken += 1
            if wrong:
                return Found(steps_taken, wrong)
            at, last = (*at[:who], at[who] + 1, *at[who + 1 :]), who
        if machine.stuck(at):
            return Found(steps_taken, machine.stuck(at))
    return Found(steps_taken, "")
