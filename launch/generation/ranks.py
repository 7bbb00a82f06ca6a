"""A generation on ranks, however they were started: steps are asked for, and tokens taken as they come."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megamoe.launch.cluster.cluster import Event, MegaMoECluster
from megamoe.launch.cluster.generation import Advance, GenerationJob, TokenFiles, generate_in_full
from megamoe.launch.cluster.torchrun_work import run_under_torchrun
from megamoe.model.generation.request import STOP, GenerationRequest, Token
from megamoe.parallel.health.waiter import Waiter

_QUICK_S, _SLOW_S = 0.1, 0.4  # how long a request for steps may take: text comes evenly, and asking costs little


class Texts:
    """Tokens as they come, from however many tries."""

    def __init__(self, request: GenerationRequest, on_token: Callable[[Token], None]) -> None:
        self.tokens: list[list[Token]] = [[] for _ in request.prompts]
        self.arrived: list[list[float]] = [[] for _ in request.prompts]
        self.begun = self.ended = time.monotonic()
        self._on_token = on_token

    def begin(self, at_s: float | None = None) -> None:
        """The model is loaded: now, or at a time of time.monotonic(); of several ranks' times the last counts."""
        self.begun = time.monotonic() if at_s is None else max(self.begun, at_s)

    def take(self, token: Token, at_s: float | None = None) -> None:
        """A token that is new, or that came before the group had to come back, and is the same then.

        at_s: when it came, of time.monotonic(); now by default.
        """
        known = self.tokens[token.prompt]
        if token.index < len(known):
            if known[token.index] != token:
                raise RuntimeError(f"prompt {token.prompt} has another token {token.index} than before the restart")
            return
        assert token.index == len(known), (token.index, len(known))
        known.append(token)
        came = time.monotonic() if at_s is None else at_s
        self.ended = max(self.ended, came)
        self.arrived[token.prompt].append(came)
        self._on_token(token)

    def token_ids(self, prompt: int) -> tuple[int, ...]:
        """A text so far, without the stop token."""
        return tuple(token.token for token in self.tokens[prompt] if token.finish != STOP)

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / max(self.ended - self.begun, 1e-9)

    @property
    def ttft_ms(self) -> float:
        return 1e3 * statistics.median(times[0] - self.begun for times in self.arrived)

    @property
    def tpot_ms(self) -> float | None:
        each = [(times[-1] - times[0]) / (len(times) - 1) for times in self.arrived if len(times) > 1]
        return 1e3 * statistics.median(each) if each else None


class OnCluster:
    """Ranks of a MegaMoECluster."""

    def __init__(self, cluster: MegaMoECluster) -> None:
        self._cluster = cluster

    @property
    def events(self) -> Sequence[Event]:
        return self._cluster.events

    def generate(self, job: GenerationJob, texts: Texts) -> list[Advance]:
        """All of the job. Steps are asked for a few at a time, as many as take about a quarter of a second."""
        parts = self._cluster.advance(job, 0)
        texts.begin()
        steps, done = 1, False
        while not done:
            asked = time.monotonic()
            found = self._cluster.advance(job, steps)
            took = time.monotonic() - asked
            parts = found if len(parts) != len(found) else [a + b for a, b in zip(parts, found, strict=True)]
            for token in _in_order(found):
                texts.take(token)
            done = all(part.done for part in found)
            steps = 2 * steps if took < _QUICK_S else max(1, steps // 2) if took > _SLOW_S else steps
        return parts

    def on_one_rank(self) -> None:
        self._cluster.resize(1)


def _in_order(parts: Sequence[Advance]) -> list[Token]:
    """Tokens of all ranks as they came: those of a step before those of the next."""
    return sorted((token for part in parts for token in part.tokens), key=lambda token: (token.index, token.prompt))


class UnderTorchrun:
    """Ranks of a torchrun that is started for each job."""

    events: Sequence[Event] = ()

    def __init__(self, ranks: int, device: str, deadline_s: float) -> None:
        self._ranks, self._device, self._deadline_s = ranks, device, deadline_s

    def generate(self, job: GenerationJob, texts: Texts) -> list[Advance]:
        with tempfile.TemporaryDirectory(prefix="megamoe-generate-") as place:
            files, ended = TokenFiles(Path(place), self._ranks, texts.begin, texts.take), threading.Event()

            def follow() -> None:
                """Takes tokens as they are written."""
                while not ended.wait(0.05):
                    files.poll()

            following = Waiter("tokens of ranks").begin(follow)
            try:
                arguments = (generate_in_full, job, self._device, Path(place))
                bound_s = 20 * self._deadline_s
                parts: list[Advance] = run_under_torchrun(
                    self._ranks, *arguments, device=self._device, deadline_s=bound_s
                )
            finally:
                ended.set()
                following.within()
            following.result()
            files.poll()
        return parts

    def on_one_rank(self) -> None:
        self._ranks = 1
