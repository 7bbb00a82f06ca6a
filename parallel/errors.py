"""The error that names a rank: who did not answer, where, in which phase, and after how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class PeerError(RuntimeError):
    """A rank was lost, stalled past the deadline, or its link broke. The group cannot be used any more.

    rank, host   the peer that did not deliver          phase   "counts", "dispatch", "combine", ...
    layer        name of the layer that waited          wave    its wave, None outside of waves
    waited_s     how long this rank waited              reason  what the transport said
    """

    rank: int
    host: str
    phase: str
    layer: str
    wave: int | None
    waited_s: float
    deadline_s: float
    reason: str

    def __str__(self) -> str:
        wave = "" if self.wave is None else f", wave {self.wave}"
        return (
            f"rank {self.rank} on {self.host} did not deliver: layer {self.layer!r}{wave}, phase {self.phase}, "
            f"after {self.waited_s:.1f} s (deadline {self.deadline_s:g} s): {self.reason}"
        )

    def __reduce__(self) -> tuple[type[PeerError], tuple[object, ...]]:
        fields = (self.rank, self.host, self.phase, self.layer, self.wave, self.waited_s, self.deadline_s, self.reason)
        return type(self), fields
