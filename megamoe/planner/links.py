"""Links that differ from rank to rank: all wait for all in every layer, so that the slowest counts.

--links scaleup=450x6,225x2 --links nic=50x4,25x4     rates of the ranks in their order, GB/s one way
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megamoe.catalog import Figure, Hardware
from megamoe.catalog.wording import plural

TIERS = {"scaleup": "scaleup_gb_s", "nic": "nic_gb_s"}


@dataclass(frozen=True, slots=True)
class Links:
    """One tier's rates, GB/s one way, a rate for every rank."""

    tier: str
    gb_s: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Links:
        """ "nic=50x3,25" -> nic, (50, 50, 50, 25). ValueError for anything else."""
        tier, equals, rates = text.partition("=")
        if not equals or tier.strip() not in TIERS:
            raise ValueError(f"links {text!r} is not of the form {' or '.join(f'{each}=450,225' for each in TIERS)}")
        found: list[float] = []
        for part in rates.split(","):
            rate, times, number = part.strip().partition("x")
            try:
                value, count = float(rate), int(number) if times else 1
            except ValueError:
                raise ValueError(f"links {text!r}: {part.strip()!r} is no rate such as 450 or 450x6") from None
            if not math.isfinite(value) or value <= 0 or not 1 <= count <= 65_536:
                raise ValueError(f"links {text!r}: {part.strip()!r} must be above 0 GB/s, for 1 to 65536 ranks")
            found += [value] * count
        return cls(tier.strip(), tuple(found))

    @property
    def slowest(self) -> int:
        """The rank whose link is slowest, the first of them."""
        return self.gb_s.index(min(self.gb_s))

    @property
    def words(self) -> str:
        """Rates that follow each other as one.    (450, 450, 225) -> "2 x 450, 225" """
        runs: list[list[float]] = []
        for rate in self.gb_s:
            if runs and runs[-1][0] == rate:
                runs[-1][1] += 1
            else:
                runs.append([rate, 1])
        return ", ".join(f"{rate:g}" if number == 1 else f"{number:g} x {rate:g}" for rate, number in runs)


def with_links(hardware: Hardware, texts: Sequence[str], ep: int | None) -> Hardware:
    """The hardware with the slowest link of each tier that is named in place of its figure.

    ValueError for a text that is none, a tier that is named twice, and a number of rates that is not the EP size.
    """
    found = [Links.parse(text) for text in texts]
    for number, each in enumerate(found):
        if each.tier in {earlier.tier for earlier in found[:number]}:
            raise ValueError(f"links of {each.tier} are given twice")
        if len(each.gb_s) != ep:
            has = "no ep is given" if ep is None else f"ep is {ep}"
            raise ValueError(
                f"links of {each.tier} name {plural(len(each.gb_s), 'rank')}, and {has}: give a rate for every rank"
            )
    changes = {
        TIERS[each.tier]: Figure(
            value=min(each.gb_s),
            tag="assumed",
            source=f"the slowest of {len(each.gb_s)} ranks' links, rank {each.slowest}'s: {each.words}",
            way="one-way",
        )
        for each in found
    }
    return hardware.model_copy(update=changes)
