"""How long a call of few tokens takes, which goes without waves: execution/small_call.py.

Of the rank that has most rows, whose experts e* are those with rows (units: schedule/machine.py, catalog/machine.py):

    a call       small_call_us
    products     6HI flops a row              / small_gflops, or small_packed_gflops with mxfp4: few rows an expert
    weights      3HI values an expert of e*   * small_weight_ns, or small_decode_ns with mxfp4
    memory       bytes of the same weights    * small_memory_ns, of what the last cache, cache_mb, does not keep of all
                 ranks' weights from call to call; asked ahead, so that products and weights with it take their 3-norm
    exchanges    two, of pages with tokens and of results, each small_exchange_us and the link's latency
    bytes        of both messages, to all other ranks  * small_byte_ns

But for memory nothing of it overlaps: it is a sum. A shaped link that has rested passes such
messages at once; where a host sends more than its link carries meanwhile, the link is what a call takes.
"""

# T tokens of a rank   H hidden   I intermediate   E experts   K experts per token   P ranks

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from megamoe.catalog.machine import Machine
from megamoe.catalog.schema import Figure
from megamoe.schedule.formats import value_bytes
from megamoe.schedule.machine import PAIR_BYTES, Predicted, Run, crowd_of, link_bytes_us

SMALL_PAGE_BYTES = 2240  # of a page with what fills it up to where slots begin
MEMORY_OVERLAP = 3.0
# of the cache: weights of all ranks from which some, and all, are gone when their turn comes again (2 cores of a Zen 5)
_FIRST_MISSED, _ALL_MISSED = 0.6, 1.7


@dataclass(frozen=True, slots=True)
class SmallAmounts:
    """What the rank with most rows does in a call: its rows, and how many of its experts have any."""

    rows: float
    experts: float

    @classmethod
    def of(cls, run: Run) -> SmallAmounts:
        """Expected of tokens that choose their experts by chance, each K different ones.

        2 ranks, 16 experts, top-4, 1 token each: 4 rows on average; sqrt(8 * 0.5 * 0.5 * 12 / 15) 1.26 is how far they
        vary, and the fuller of two has 0.83 of that more -> 5.05 rows. A token misses each of its 8 experts with chance
        1 - 5.05 / 16, both tokens with the square of it -> 8 * (1 - 0.468), 4.26 experts
        """
        size, held = run.ranks, run.spread.experts_per_rank
        tokens, share = size * run.tokens_per_rank, held / run.num_experts
        rows = tokens * run.topk * share
        if size > 1 and run.num_experts > 1:
            others = (run.num_experts - run.topk) / (run.num_experts - 1)
            most = NormalDist().inv_cdf((size - 0.375) / (size + 0.25)) * sqrt(size / (size - 1))
            rows += most * sqrt(rows * (1 - share) * others)
        rows = min(rows, float(tokens * min(run.topk, held)))
        missed = (1 - rows / held / max(tokens, 1)) ** tokens
        return cls(rows, held * (1 - missed))


def small_bytes(run: Run) -> float:
    """Sent by a rank: its page and tokens to each other rank, and results of other ranks' rows."""
    brought = SMALL_PAGE_BYTES + run.tokens_per_rank * (run.token_bytes + PAIR_BYTES * run.topk)
    return (run.ranks - 1) * brought + run.combine_bytes


def small_compute_us(run: Run, machine: Machine, amounts: SmallAmounts) -> float:
    """Computing alone. ValueError where a machine does not say what such a call takes."""
    gflops, weight_ns = (
        (machine.small_packed_gflops, machine.small_decode_ns)
        if run.packed
        else (machine.small_gflops, machine.small_weight_ns)
    )
    matrices = 3 * run.hidden * run.intermediate
    products = 2 * matrices * amounts.rows / _value(machine, gflops) / 1e3
    weights = matrices * amounts.experts * _value(machine, weight_ns) / 1e3
    computing = (products + weights) * crowd_of(run, machine)
    memory = missed_bytes(run, machine, amounts) * (machine.small_memory_ns.value if machine.small_memory_ns else 0.0)
    return _value(machine, machine.small_call_us) * crowd_of(run, machine) + norm(computing, memory / 1e3)


def norm(computing: float, memory: float) -> float:
    """What both take together: nearly the longer, a quarter more where they are equal.    3, 3 -> 3.78"""
    return float((computing**MEMORY_OVERLAP + memory**MEMORY_OVERLAP) ** (1 / MEMORY_OVERLAP))


def missed_bytes(run: Run, machine: Machine, amounts: SmallAmounts) -> float:
    """Of the weights that a rank reads in a call, those that do not lie in a cache, which all ranks share.

    cache_mb 32, two ranks: 50 MB each -> 50 MB      8 MB each -> 0      18.4 MB each, 36.8 of 32 -> half of 18.4 MB
    """
    size = 3 * run.hidden * run.intermediate * amounts.experts * value_bytes(run.weight_format)
    if not size or machine.cache_mb is None or not machine.cache_mb.value:
        return size
    filled = run.ranks * size / (machine.cache_mb.value * 1e6)
    return size * min(1.0, max(0.0, (filled - _FIRST_MISSED) / (_ALL_MISSED - _FIRST_MISSED)))


def small_communication_us(run: Run, machine: Machine) -> float:
    """Both exchanges, over a link that has rested."""
    if run.ranks == 1:
        return 0.0
    exchange = _value(machine, machine.small_exchange_us) + run.latency_ms * 1e3
    return 2 * exchange + small_bytes(run) * _value(machine, machine.small_byte_ns) / 1e3


def predict_small(run: Run, machine: Machine) -> Predicted:
    """ValueError where a machine does not say what such a call takes. There is no serial call of the kind to tell."""
    compute = small_compute_us(run, machine, SmallAmounts.of(run))
    alone = small_communication_us(run, machine)
    carried = 0.0
    if run.link_gb_s and run.ranks > 1:
        together = min(run.ranks_per_host, run.ranks)
        far = (run.ranks - together) / (run.ranks - 1)
        carried = together * far * small_bytes(run) / link_bytes_us(run, machine)
    whole = max(compute + alone, carried)
    return Predicted(1, compute / 1e3, alone / 1e3, whole / 1e3, whole / 1e3)


def _value(machine: Machine, figure: Figure | None) -> float:
    if figure is None:
        raise ValueError(f"{machine.name} does not say what calls without waves take: megamoe bench measures it")
    return figure.value
