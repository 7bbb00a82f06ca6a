"""A generation on a worker: the model, which stays from group to group, and the steps that it is asked for."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamoe.model.generation.engine import Generation
from megamoe.model.generation.request import GenerationRequest, Token
from megamoe.model.loading.load import load, regroup
from megamoe.parallel.group import EPGroup
from megamoe.parallel.recorder import Recording
from megamoe.trace.timeline import Share, Timeline

_RECORDED = 16  # steps, of which one is recorded


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """A request to a checkpoint. id: tells one job from another; waves: of the layers."""

    id: str
    model: Path
    request: GenerationRequest
    experts: str = "checkpoint"
    waves: Any = "auto"


@dataclass(frozen=True, slots=True)
class Advance:
    """What some steps of a job came to on one rank: tokens of its prompts, and whether all texts of all ranks are done.

    recording    of the steps that were recorded, one of 16
    bytes_read   of the checkpoint, when the model was loaded last
    """

    tokens: tuple[Token, ...]
    done: bool
    steps: int
    recording: Recording
    bytes_read: int

    def __add__(self, later: Advance) -> Advance:
        """These steps and later ones."""
        spans, flights = (getattr(self.recording, n) + getattr(later.recording, n) for n in ("spans", "flights"))
        return Advance(
            self.tokens + later.tokens,
            later.done,
            self.steps + later.steps,
            Recording(self.recording.rank, self.recording.host, spans, flights),
            later.bytes_read,
        )


def shared(parts: Sequence[Advance]) -> Share:
    """How much of all ranks' communication hid under compute, in the steps of theirs that were recorded."""
    return Share.sum([run.share() for run in Timeline.merge([part.recording for part in parts]).runs()])


class GenerationWorker:
    """One model and one generation at a time. All ranks of a group are asked the same."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._model: Any = None
        self._loaded: tuple[Any, ...] = ()
        self._generation: Generation | None = None
        self._job: GenerationJob | None = None

    def leave(self) -> None:
        """Lets go of the group. The model stays."""
        self._generation = None

    def advance(self, group: EPGroup, job: GenerationJob, steps: int) -> Advance:
        """The next steps of a job, which begins anew where it is another, or the group is. 0 steps only load.

        Errors as load() and Generation have them.
        """
        if self._generation is None or self._job != job:
            self._generation = None
            self._generation, self._job = Generation(self._model_in(group, job), group, job.request), job
        generation, tokens, taken = self._generation, list[Token](), 0
        recording = Recording(group.rank, group.host)
        while taken < steps and not generation.done:
            with self._recorded(group, generation, recording):
                tokens += generation.step()
            taken += 1
        return Advance(tuple(tokens), generation.done, taken, recording, self._model.megamoe_report.bytes_read)

    def _recorded(self, group: EPGroup, generation: Generation, recording: Recording) -> AbstractContextManager[None]:
        """A step of which notes are taken: not of all, since small calls feel it. Host time says something of CPUs."""
        if generation.steps % _RECORDED or self._device != "cpu" or group.size == 1:
            return nullcontext()
        return group.record(recording)

    def _model_in(self, group: EPGroup, job: GenerationJob) -> Any:
        """The job's model in the group: of a model that is there already, only experts that it lacks are read."""
        wanted = (job.model, job.experts, job.waves)
        model, self._model = self._model if self._loaded == wanted else None, None
        if model is None:
            gc.collect()
            model = load(job.model, group=group, device=self._device, experts=job.experts, waves=job.waves)
        else:
            regroup(model, group)
            gc.collect()  # the model was the last that knew its old group
        self._model, self._loaded = model, wanted
        return model


def generate_in_full(group: EPGroup, job: GenerationJob, device: str, place: Path) -> Advance:
    """A whole job on one rank of a group; its tokens go to place/tokens-RANK as they come, a line of JSON each.

    Each line has the time at which it was written, by a clock that all processes of a machine share. The first line
    has nothing else: the model is loaded.
    """
    worker = GenerationWorker(device)
    whole = worker.advance(group, job, 0)
    with (place / f"tokens-{group.rank}").open("w", encoding="utf-8") as file:
        file.write(json.dumps({"at_s": time.monotonic()}) + "\n")
        while not whole.done:
            part = worker.advance(group, job, 1)
            for token in part.tokens:
                file.write(json.dumps({"at_s": time.monotonic(), **asdict(token)}) + "\n")
            file.flush()
            whole = whole + part
    return whole


class TokenFiles:
    """What ranks have written to place/tokens-RANK so far, each line once.

    begin    called with the time at which a rank had loaded the model, once for each
    take     called with each token and the time at which its rank had it
    """

    def __init__(
        self, place: Path, ranks: int, begin: Callable[[float], None], take: Callable[[Token, float], None]
    ) -> None:
        self._files = [place / f"tokens-{rank}" for rank in range(ranks)]
        self._read = [0] * ranks
        self._begin, self._take = begin, take

    def poll(self) -> None:
        for rank, file in enumerate(self._files):
            if not file.exists():
                continue
            with file.open("rb") as stream:
                stream.seek(self._read[rank])
                lines = stream.read()
            whole = lines[: lines.rfind(b"\n") + 1]
            self._read[rank] += len(whole)
            for line in whole.splitlines():
                token = json.loads(line)
                at_s = token.pop("at_s")
                if token:
                    self._take(Token(**token), at_s)
                else:
                    self._begin(at_s)
