"""How long the backward of this package's layer takes: its products in the order of schedule/backward.py, its links.

Of an expert with n rows, in BF16, as tiles over all SMs (layer/tiles.py), each with its weights and rows in memory:

    recompute   n x 2d over h             Linear-1 again, where the forward kept tokens alone
    data        n x d over h, n x h over 2d       gradients of activations and of tokens
    weights     2d x h over n, h x d over n       gradients of both weights, written in FP32; they need no link

A token's output gradient goes once to each rank that has one of its experts, and a row's gradient goes home. Compute
and memory of a product together take their p-norm, all products and all links theirs, as in the forward; the waves are
then played. Every launch takes kernel_us. Nothing of it was run on a GPU: assumed throughout.
"""

# n rows of an expert   h hidden   d intermediate   T tokens of a rank   P ranks   W waves

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from megamoe.catalog import Profile
from megamoe.planner.layer.cost import Hiding, row_us
from megamoe.planner.layer.device import Device
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.routing import RankLoad, busiest
from megamoe.planner.layer.stacks import sent_once
from megamoe.planner.layer.tiles import matrix_us
from megamoe.schedule.backward import (
    DATA,
    HOME_BYTES,
    RECOMPUTE,
    WEIGHTS,
    BackwardLoad,
    PlayedBackward,
    Saved,
    play_backward,
)
from megamoe.schedule.formats import value_bytes

# launches of a wave: Linear-1; its rows packed and decoded, Linear-2's gradient, the activation's, Linear-1's; both
# weights' gradients. Around all waves: the gradients packed and encoded, the sum of the slots
_LAUNCHES = {RECOMPUTE: 1, DATA: 5, WEIGHTS: 2}
_AROUND = 3


@dataclass(frozen=True, slots=True)
class Backward(Hiding):
    """Microseconds of one backward on the rank that is last, means over draws of the routing.

    backward_us    fixed_us + core_us + sum_us      latency_us   of core_us, where ranks lie in several domains
    recompute_us, data_us, weights_us    products with their memory, without links;  alone_us   all of them and launches
    core_us        the waves as played, from the first dispatch to the last result or weight gradient
    exposed_us     core_us - alone_us          hidden   the share of communication_us that does not show
    """

    backward_us: float
    fixed_us: float
    latency_us: float
    sum_us: float
    recompute_us: float
    data_us: float
    weights_us: float
    waves: int
    rows: float
    played: PlayedBackward


def backward_time(
    expert: Expert,
    device: Device,
    profile: Profile,
    *,
    ep: int,
    tokens_per_rank: float,
    routing: str = "balanced",
    redundant: int = 0,
    waves: int = 1,
    saved: Saved = "tokens",
    gradient_format: str = "bf16",
) -> Backward:
    """One backward in the forward's waves. device: at its BF16 peak."""
    passes = Pass(expert, device, profile, ep, tokens_per_rank, waves, saved, gradient_format)
    drawn = busiest(routing, expert.num_experts, expert.topk, ep, tokens_per_rank, redundant)
    last = [max((passes.of(load) for load in ranks), key=lambda found: found.played.total) for ranks in drawn]
    slots = tokens_per_rank * (expert.topk * passes.home_bytes + 2 * expert.hidden)
    fixed, summed = _AROUND * profile.kernel_us.value, device.memory_us(slots)
    core = fmean(each.played.total + passes.latency_us for each in last)
    return Backward(
        backward_us=fixed + core + summed,
        fixed_us=fixed,
        latency_us=passes.latency_us,
        core_us=core,
        sum_us=summed,
        recompute_us=fmean(each.work[RECOMPUTE] for each in last),
        data_us=fmean(each.work[DATA] for each in last),
        weights_us=fmean(each.work[WEIGHTS] for each in last),
        alone_us=fmean(each.alone_us for each in last),
        dispatch_us=fmean(each.dispatch_us for each in last),
        combine_us=fmean(each.combine_us for each in last),
        waves=waves,
        rows=fmean(each.rows for each in last),
        played=last[0].played,
    )


@dataclass(frozen=True, slots=True)
class _Rank:
    """What one rank does, in microseconds; work by RECOMPUTE, DATA and WEIGHTS."""

    rows: float
    work: dict[str, float]
    alone_us: float
    dispatch_us: float
    combine_us: float
    played: PlayedBackward


@dataclass(frozen=True, slots=True)
class Pass:
    """A backward of a layer, but for what a rank's load is."""

    expert: Expert
    device: Device
    profile: Profile
    ep: int
    tokens: float
    waves: int
    saved: Saved
    gradient_format: str

    @property
    def gradient_bytes(self) -> float:
        """Of a token's gradient on the link."""
        return self.expert.hidden * value_bytes(self.gradient_format)

    @property
    def home_bytes(self) -> float:
        """Of a row on its way home."""
        return self.gradient_bytes + HOME_BYTES

    @property
    def there_bytes(self) -> float:
        """Of a token on its way out, once for all rows of a rank."""
        return self.gradient_bytes + (self.expert.dispatch_bytes if self.saved == "dispatch-again" else 0.0)

    @property
    def latency_us(self) -> float:
        return 2 * self.device.exchange_us if self.ep > self.device.scaleup_domain else 0.0

    def of(self, load: RankLoad) -> _Rank:
        rows = load.rows
        if not rows:
            return _Rank(0.0, {RECOMPUTE: 0.0, DATA: 0.0, WEIGHTS: 0.0}, 0.0, 0.0, 0.0, PlayedBackward(0.0, []))
        work = self._work(load)
        own = self.tokens * self.expert.topk
        tiers = self.device.tiers(self.ep, sent=sent_once(self.expert, self.ep))
        row = row_us(self.device, self.ep, rows, own, self.there_bytes, self.home_bytes, tiers)
        there, back = rows * row.there_us, rows * row.back_us
        products = sum(work.values())
        # links and products get in each other's way, as in the forward
        slower = self.device.with_links(products, there + back) / products
        steps = {
            kind: us * slower + (self.waves * _LAUNCHES[kind] * self.profile.kernel_us.value if us else 0.0)
            for kind, us in work.items()
        }
        alone = products + sum(steps.values()) - products * slower
        return _Rank(rows, work, alone, there, back, self._play(steps, there, back))

    def _play(self, steps: dict[str, float], there: float, back: float) -> PlayedBackward:
        """Tokens that are dispatched again come with the gradients, so that nothing is recomputed before."""
        steps = dict(steps)
        if self.saved == "dispatch-again":
            steps = {RECOMPUTE: 0.0, DATA: steps[DATA] + steps[RECOMPUTE], WEIGHTS: steps[WEIGHTS]}
        parts = (steps[RECOMPUTE], steps[DATA], steps[WEIGHTS], there, back)
        return play_backward(BackwardLoad(*([each / self.waves] * self.waves for each in parts)))

    def _work(self, load: RankLoad) -> dict[str, float]:
        """Products with their memory, of all experts."""
        found = {RECOMPUTE: 0.0, DATA: 0.0, WEIGHTS: 0.0}
        for rows, number in load.groups:
            each = self._of_expert(rows)
            for kind in found:
                found[kind] += each[kind] * number
        return found

    def _of_expert(self, rows: float) -> dict[str, float]:
        """One expert's products; bytes: what each reads and writes beside what stays on the chip."""
        expert, device = self.expert, self.device
        (h, first), (d, _) = expert.products
        weights = first * h + h * d
        between = 2 * (2 * first + d)  # Linear-1's results and their gradient, and the activated row again, BF16
        held = expert.weight_bytes * first * h / weights
        read = held + rows * (expert.dispatch_bytes + 2 * first)
        return {
            RECOMPUTE: 0.0
            if self.saved == "activations"
            else device.with_memory(matrix_us(device, rows, first, h), device.memory_us(read)),
            DATA: device.with_memory(
                matrix_us(device, rows, d, h) + matrix_us(device, rows, h, first),
                device.memory_us(2 * weights + rows * (self.gradient_bytes + 8 * d + between + self.home_bytes)),
            ),
            WEIGHTS: device.with_memory(
                matrix_us(device, first, h, rows) + matrix_us(device, h, d, rows),
                device.memory_us(4 * weights + rows * (4 * h + 2 * d + 2 * first)),
            ),
        }
