"""Which rank holds which experts: contiguous runs, as even as they can be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """Experts 0..E-1 in contiguous runs over the ranks; the first E % ep_size ranks hold one more.

    Placement(10, 4):  rank 0 [0, 3)   rank 1 [3, 6)   rank 2 [6, 8)   rank 3 [8, 10)
    Placement(2, 3):   rank 0 [0, 1)   rank 1 [1, 2)   rank 2 holds none
    """

    num_experts: int
    ep_size: int

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.ep_size < 1:
            raise ValueError(f"num_experts {self.num_experts} and ep_size {self.ep_size} must be positive")

    def experts(self, ep_rank: int) -> range:
        """Global ids of the experts that ep_rank holds."""
        share, extra = divmod(self.num_experts, self.ep_size)
        start = ep_rank * share + min(ep_rank, extra)
        return range(start, start + share + (ep_rank < extra))

    def ranks(self) -> list[int]:
        """The rank that holds each expert.    5 experts, 2 ranks -> [0, 0, 0, 1, 1]"""
        return [rank for rank in range(self.ep_size) for _ in self.experts(rank)]

    @property
    def most(self) -> int:
        """Number of experts on the rank that holds most."""
        return -(-self.num_experts // self.ep_size)
