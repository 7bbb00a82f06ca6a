"""Where a rank is: the note that every rank keeps of itself, and what is left of it when the rank is lost."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, fields

OUTSIDE, WORKING, WAITING, RAISED, LEFT = "outside", "working", "waiting", "raised", "left"
_LAST = (RAISED, LEFT)
_WAITS = ("counts", "more counts", "dispatch", "combine")  # of a call, in the order in which every rank makes them
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("state", "layer", "phase", "complaint"), (str,)),
    **dict.fromkeys(("call", "sequence", "calls"), (int,)),
    **dict.fromkeys(("wave", "peer"), (int, type(None))),
    **dict.fromkeys(("age_s", "looked_s"), (int, float)),
    "between": (bool,),
}


@dataclass(frozen=True, slots=True)
class RankStatus:
    """What a rank does, as it says itself.

    state      "outside" of any call, "working", "waiting", "raised" (it will do no more in this group) or "left"
    layer      name of the layer whose call it is in or, outside, was in last; "" before the first
    call       number of that call, from 1
    wave       of the phase, None outside of waves
    phase      "counts", "dispatch", "linear-1", ..., "" where there is none
    peer       the rank that it waits for, or blames where it raised; None where there is none
    sequence   how many notes the rank has taken
    age_s      seconds since it came there
    complaint  what it raised
    calls      of all layers of the group that it has begun; ranks make the same calls in the same order
    between    whether it waits outside of a call: an exchange of the program, after the last call that it began
    looked_s   seconds since it gave up what it waits for and only asks who is to blame, 0 while it looks for it
    """

    state: str = OUTSIDE
    layer: str = ""
    call: int = 0
    wave: int | None = None
    phase: str = ""
    peer: int | None = None
    sequence: int = 0
    age_s: float = 0.0
    complaint: str = ""
    calls: int = 0
    between: bool = False
    looked_s: float = 0.0

    @classmethod
    def of(cls, record: object, size: int) -> RankStatus | None:
        """What asdict() made, as it came over a connection: None for what is no position in a group of that size.

        A field that is missing or unknown is another version's, and no reason to doubt the rest.
        """
        if not isinstance(record, dict):
            return None
        known = {each.name: record[each.name] for each in fields(cls) if each.name in record}
        if not all(isinstance(value, _TYPES[name]) for name, value in known.items()):
            return None
        found = cls(**known)
        return found if found.peer is None or 0 <= found.peer < size else None

    def is_past(self, other: RankStatus) -> bool:
        """Whether this rank has come further than where the other waits, and so has sent all that the other waits for.

        A rank sends what belongs to a wait before it waits itself. False where the two cannot be compared.
        """
        if self.state in _LAST or not self.calls:
            return False
        if self.calls != other.calls:
            return self.calls > other.calls
        mine, theirs = self._progress, other._progress
        return mine is not None and theirs is not None and mine > theirs

    @property
    def _progress(self) -> tuple[int, int] | None:
        """How far in its latest call: which wait, of which wave. None where it does not wait, or for something else."""
        if self.state == OUTSIDE or self.between:
            return len(_WAITS), 0
        if self.state == WAITING and self.phase in _WAITS:
            return _WAITS.index(self.phase), self.wave or 0
        return None

    @property
    def place(self) -> str:
        """Where, in words.    "layer 'moe', call 7, wave 2, combine" """
        if not self.layer:
            return "before its first call"
        words = [f"layer {self.layer!r}", f"call {self.call}"]
        words += [] if self.wave is None else [f"wave {self.wave}"]
        return ", ".join([*words, self.phase] if self.phase else words)

    def __str__(self) -> str:
        since = f"for {self.age_s:.1f} s"
        if self.state == WAITING:
            whom = "others" if self.peer is None else f"rank {self.peer}"
            return f"waits for {whom}, {since}: {self.place}"
        if self.state == WORKING:
            return f"works, {since}: {self.place}"
        if self.state == RAISED and self.peer is not None:
            return f"gave up {self.age_s:.1f} s ago, rank {self.peer} is {self.complaint}: {self.place}"
        if self.state == RAISED:
            return f"raised {self.complaint} {self.age_s:.1f} s ago: {self.place}"
        where = f"after call {self.call} of layer {self.layer!r}" if self.layer else "before its first call"
        gone = "has left the group" if self.state == LEFT else "is outside of any call"
        return f"{gone}, {since}, {where}"


class OwnStatus:
    """This rank's own position. A note is one assignment, and a call takes some twenty-five of them."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self._calling, self.waited_s = False, 0.0  # in this call so far
        self._watched: dict[tuple[str, int | None], int | None] = {}  # whom other threads wait for, on its behalf
        self._layer, self._call, self._sequence, self.calls = "", 0, 0, 0
        self._gave_up = -1, 0.0  # number of the note, and when
        self._now: tuple[str, int | None, str, int | None, float, str] = (OUTSIDE, None, "", None, time.monotonic(), "")

    @property
    def busy(self) -> bool:
        """Whether a call is on its way, or a wait outside of one."""
        return self._now[0] in (WORKING, WAITING)

    def awaits(self, rank: int) -> bool:
        """Whether this rank waits for that one, in any of its threads, or for others whom it does not know."""
        state, wave, phase, peer, _, _ = self._now
        watched = dict(self._watched)
        if rank in watched.values():
            return True
        return state == WAITING and (peer == rank or (peer is None and (phase, wave) not in watched))

    def enter(self, layer: str, call: int) -> None:
        """A call of a layer begins."""
        self.thread = threading.get_ident()
        self.calls += 1
        self._layer, self._call, self._calling, self.waited_s = layer, call, True, 0.0
        self._watched.clear()
        self._note(WORKING, None, "begin", None)

    def work(self, phase: str, wave: int | None = None) -> None:
        """This rank computes, or hands over what it sends."""
        self._note(WORKING, wave, phase, None)

    def wait(self, phase: str, wave: int | None, peer: int | None) -> None:
        """This rank waits for a peer, None for others whom it does not know.

        Where another thread than the call's own waits, the rank does not: that says whom the call waits for, once it
        waits for the same phase and wave.
        """
        if threading.get_ident() == self.thread:
            self._note(WAITING, wave, phase, peer)
        else:
            self._watched[phase, wave] = peer

    def arrived(self, phase: str, wave: int | None, took_s: float) -> None:
        """What this rank waited for is there, after so long."""
        if threading.get_ident() != self.thread:
            self._watched.pop((phase, wave), None)
        elif self._calling:
            self.waited_s += took_s
            self._note(WORKING, wave, phase, None)
        else:
            self._note(OUTSIDE, None, "", None)

    def give_up(self) -> None:
        """A wait has failed: this rank looks no more for what it waited for, and has yet to raise."""
        self._gave_up = self._sequence, time.monotonic()

    def leave(self) -> None:
        """The call has ended."""
        self._calling, self.waited_s = False, 0.0
        self._note(OUTSIDE, None, "", None)

    def end(self, state: str, peer: int | None = None, complaint: str = "") -> None:
        """The last note: this rank has raised or left. Where it raised is where it was."""
        if self._now[0] not in _LAST:
            _, wave, phase, _, _, _ = self._now
            self._sequence += 1
            self._now = (state, wave, phase, peer, time.monotonic(), complaint)

    def _note(self, state: str, wave: int | None, phase: str, peer: int | None) -> None:
        if self._now[0] in _LAST:  # a rank that has raised or left keeps its last word
            return
        self._sequence += 1
        self._now = (state, wave, phase, peer, time.monotonic(), "")

    def position(self) -> RankStatus:
        state, wave, phase, peer, since, complaint = self._now
        if state == WAITING and peer is None:
            peer = self._watched.get((phase, wave))
        age = time.monotonic() - since
        between = state == WAITING and not self._calling
        note, gave_up = self._gave_up
        looked = time.monotonic() - gave_up if note == self._sequence else 0.0
        said = state, self._layer, self._call, wave, phase, peer, self._sequence, age, complaint, self.calls
        return RankStatus(*said, between, looked)
