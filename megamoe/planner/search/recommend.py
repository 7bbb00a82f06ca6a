"""How many devices a load needs: one pool that prefills, one that decodes, and how each is to be run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megamoe.catalog import Hardware, Model, Profile
from megamoe.planner.question import LARGEST, check_load
from megamoe.planner.search.search import Space, Split, Targets, deployments, splits
from megamoe.planner.serving.deployment import Deployment
from megamoe.planner.serving.memory import Memory, memory
from megamoe.planner.serving.serving import Serving, measure
from megamoe.planner.serving.step import Costs, least_us

UTILIZATION = 0.8  # of a pool's throughput that is planned for: requests come in bursts
LARGEST_REQUESTS_PER_S = 10**12  # more than a hundred of each human
QUEUE = 1.5  # prefill steps from a request's arrival to its first token: half of the one under way, then its own


@dataclass(frozen=True, slots=True)
class Load:
    """What users ask for. cached: tokens of the input whose cache is there already, on average."""

    requests_per_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.requests_per_s > 0:
            raise ValueError(f"requests_per_s is {self.requests_per_s:g}; it must be above 0")
        if self.requests_per_s > LARGEST_REQUESTS_PER_S:
            most = f"the planner goes up to {LARGEST_REQUESTS_PER_S:g}"
            raise ValueError(f"requests_per_s is {self.requests_per_s:g}; {most}")
        for key in ("input_tokens", "output_tokens"):
            value, most_tokens = getattr(self, key), LARGEST["context"]
            if value < 1:
                raise ValueError(f"{key} is {value}; it must be 1 or more")
            if value > most_tokens:
                raise ValueError(f"{key} is {value}; the planner goes up to {most_tokens}")
        if not 0 <= self.cached_tokens < self.input_tokens:
            raise ValueError(f"cached_tokens {self.cached_tokens} lies outside 0 .. {self.input_tokens - 1}")


@dataclass(frozen=True, slots=True)
class Pool:
    """So many replicas of one deployment. load and capacity in tokens per second of the pool."""

    serving: Serving
    replicas: int
    load_tokens_per_s: float

    @property
    def devices(self) -> int:
        return self.replicas * self.serving.deployment.devices

    @property
    def capacity_tokens_per_s(self) -> float:
        return self.devices * self.serving.tokens_per_s_per_device

    @property
    def utilization(self) -> float:
        return self.load_tokens_per_s / self.capacity_tokens_per_s


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The two pools. ttft_ms counts the wait for the prefill step under way; usd_per_hour is None without a price."""

    load: Load
    prefill: Pool
    decode: Pool
    ttft_ms: float
    usd_per_hour: float | None

    @property
    def devices(self) -> int:
        return self.prefill.devices + self.decode.devices


def recommend(
    model: Model,
    hardware: Hardware,
    profile: Profile,
    load: Load,
    *,
    targets: Targets | None = None,
    prefill_space: Space | None = None,
    decode_space: Space | None = None,
) -> Recommendation:
    """The fewest devices that carry a load at 80 % of their throughput and meet the targets.

    Decode holds the mean context, input and half of the output. ValueError that says what is nearest where nothing fits
    or meets the targets.
    """
    targets = targets or Targets()
    prompt = Deployment(model, hardware, profile, 1, 1, 1, load.input_tokens, "prefill", cached=load.cached_tokens)
    answer = Deployment(model, hardware, profile, 1, 1, 1, load.input_tokens + load.output_tokens // 2)
    first = Targets(ttft_ms=None if targets.ttft_ms is None else targets.ttft_ms / QUEUE)
    new_tokens = load.requests_per_s * (load.input_tokens - load.cached_tokens)
    prefill = _smallest(prompt, prefill_space or Space.of(model, hardware, phase="prefill"), first, new_tokens)
    decode = _smallest(
        answer, decode_space or Space.of(model, hardware), targets, load.requests_per_s * load.output_tokens
    )
    for pool in (prefill, decode):  # each goes on as a question of so many devices
        share = UTILIZATION * pool.serving.tokens_per_s_per_device / pool.load_tokens_per_s
        group = pool.serving.deployment.devices
        check_load("requests_per_s", load.requests_per_s, share * load.requests_per_s, group)
    ttft_ms = QUEUE * (prefill.serving.ttft_ms or 0.0)
    price = hardware.usd_per_hour
    usd = None if price is None else price.value * (prefill.devices + decode.devices)
    return Recommendation(load, prefill, decode, ttft_ms, usd)


def _smallest(base: Deployment, space: Space, targets: Targets, load: float) -> Pool:
    """The pool with the fewest devices; of equals the one that is fastest for a user.

    What could not be better even if its experts took no time is not measured. Large batches come first, which need the
    fewest devices.
    """
    best: Pool | None = None
    for split in splits(base, space):
        if best is not None and split.devices > best.devices:
            continue
        for mtp, halves in itertools.product(space.mtps, space.microbatches):
            for d, held in reversed(_fitting(split, mtp, halves, space)):
                if best is not None and _best_rank(split.costs, d, load) > _rank(best):
                    continue
                served = measure(split.costs, d, held)
                if not targets.missed(served):
                    pool = _pool(served, load)
                    best = pool if best is None or _rank(pool) < _rank(best) else best
    if best is None:
        raise ValueError(_why_not(base, space, targets))
    return best


def _fitting(split: Split, mtp: int, halves: int, space: Space) -> list[tuple[Deployment, Memory]]:
    """By batch; a larger one never needs less memory."""
    found = []
    for batch in sorted(space.batches):
        if halves <= batch:
            d = split.deployment(batch, mtp, halves)
            held = memory(split.costs, d)
            if not held.fits:
                break
            found.append((d, held))
    return found


def _pool(served: Serving, load: float) -> Pool:
    return Pool(served, _replicas(load, served.tokens_per_s_per_device * served.deployment.devices), load)


def _replicas(load: float, tokens_per_s: float) -> int:
    return math.ceil(load / (tokens_per_s * UTILIZATION))


def _best_rank(costs: Costs, d: Deployment, load: float) -> tuple[int, float]:
    """The rank of a deployment if all its steps took no longer than attention and the head."""
    decodes, seconds = d.phase == "decode", least_us(costs, d) / 1e6 * (1 - 1e-9)  # sums of floats in another order
    tokens, of_user = (d.batch_per_device * d.accepted, d.accepted) if decodes else (d.new_tokens, d.context - d.cached)
    return _replicas(load, tokens / seconds * d.devices) * d.devices, -of_user / seconds


def _rank(pool: Pool) -> tuple[int, float]:
    return pool.devices, -pool.serving.tokens_per_s_per_user


def _that_fit(base: Deployment, space: Space) -> Iterator[Serving]:
    for costs, d in deployments(base, space):
        held = memory(costs, d)
        if held.fits:
            yield measure(costs, d, held)


def _why_not(base: Deployment, space: Space, targets: Targets) -> str:
    """What is nearest: the least memory where nothing fits, else the best that there is of the target missed."""
    where = f"{base.model.name} on {base.hardware.name}, {base.phase} at {base.context} tokens"
    fitting = list(_that_fit(base, space))
    if not fitting:
        least = min((memory(costs, d) for costs, d in deployments(base, space)), key=lambda held: held.total_gb)
        gb = f"{least.total_gb:.1f} GB of {least.capacity_gb:.1f}"
        return f"{where}: no deployment fits; the least needs {gb} a device"
    fastest = max(fitting, key=lambda served: served.tokens_per_s_per_user)
    if base.phase == "prefill":
        return (
            f"{where}: no deployment reaches ttft_ms {QUEUE * (targets.ttft_ms or 0.0):g}; "
            f"the fastest takes {QUEUE * (fastest.ttft_ms or 0.0):.0f} ms"
        )
    return (
        f"{where}: no deployment meets {targets.missed(fastest)}; the fastest has {fastest.tpot_ms:.1f} ms a token, "
        f"{fastest.tokens_per_s_per_user:.0f} tokens/s a user"
    )
