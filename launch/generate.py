"""Texts from a checkpoint on ranks that are started for it: streamed in order, measured, and made again where asked."""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers import AutoConfig

from megamoe.launch.cluster.cluster import LAUNCHERS, Event, MegaMoECluster
from megamoe.launch.cluster.generation import Advance, GenerationJob, TokenFiles, generate_in_full, shared
from megamoe.launch.cluster.recovery import RestartPolicy
from megamoe.launch.cluster.torchrun_work import run_under_torchrun
from megamoe.launch.prompts import Given, TextStream, encode
from megamoe.model.generation.request import STOP, GenerationRequest, Token, check_fits
from megamoe.model.generation.sampling import Sampling
from megamoe.model.loading.load import load_tokenizer
from megamoe.model.loading.skeleton import read_config
from megamoe.routing.waves import Waves, check_waves

OnText = Callable[[str, str, bool], None]  # prompt's id, more of its text, whether that is all
Progress = Callable[[str], None]
_QUICK_S, _SLOW_S = 0.1, 0.4  # how long a request for steps may take: text comes evenly, and asking costs little


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What `megamoe generate` is asked for.

    raw     texts go to the model as they are, without its chat template
    check   the same again on one rank
    """

    model: Path
    prompts: tuple[Given, ...]
    ranks: int = 2
    launcher: str = "spawn"
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    experts: str = "checkpoint"
    waves: Waves = "auto"
    raw: bool = False
    check: bool = False
    device: str = "cpu"
    deadline_s: float = 60.0
    threads: int | None = None
    run: str | None = None
    policy: RestartPolicy = field(default_factory=RestartPolicy)

    def __post_init__(self) -> None:
        if self.launcher not in (*LAUNCHERS, "torchrun"):
            raise ValueError(f"launcher must be ray, spawn or torchrun, got {self.launcher!r}")
        if self.ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}")
        if self.deadline_s <= 0:
            raise ValueError(f"deadline_s must be positive, got {self.deadline_s}")
        if self.launcher == "torchrun" and (self.policy.restarts or self.run):
            raise ValueError("under torchrun ranks are not restarted and have no run: use launcher spawn or ray")
        if not self.prompts:
            raise ValueError("there are no prompts")
        check_waves(self.waves)


@dataclass(frozen=True, slots=True)
class Text:
    """What became of a prompt. token_ids: without the stop token that ended it; finish_reason: "stop" or "length"."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class GenerateReport:
    """Texts, and how they came about. Times are those of the process that asked, from when the model was loaded.

    tokens_per_s     new tokens of all prompts
    ttft_ms          until a prompt's first token, the median over the prompts
    tpot_ms          between its tokens after that, likewise; None where no text has two
    hidden_percent   of the time that rows were on their way to a rank, how much it computed; None on one rank, and on
                     devices other than CPUs
    identical        whether one rank gave the same tokens; None where it was not asked
    one_rank_tokens_per_s   on that one rank
    """

    model: str
    launcher: str
    ranks: int
    prompts: tuple[Text, ...]
    new_tokens: int
    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float | None
    hidden_percent: float | None
    identical: bool | None
    one_rank_tokens_per_s: float | None
    load_s: float
    events: tuple[dict[str, object], ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class _Texts:
    """Tokens as they come, from however many tries."""

    def __init__(self, request: GenerationRequest, on_token: Callable[[Token], None]) -> None:
        self.tokens: list[list[Token]] = [[] for _ in request.prompts]
        self.arrived: list[list[float]] = [[] for _ in request.prompts]
        self.begun = self.ended = time.monotonic()
        self._on_token = on_token

    def begin(self) -> None:
        self.begun = time.monotonic()

    def take(self, token: Token) -> None:
        """A token that is new, or that came before the group had to come back, and is the same then."""
        known = self.tokens[token.prompt]
        if token.index < len(known):
            if known[token.index] != token:
                raise RuntimeError(f"prompt {token.prompt} has another token {token.index} than before the restart")
            return
        assert token.index == len(known), (token.index, len(known))
        known.append(token)
        self.ended = time.monotonic()
        self.arrived[token.prompt].append(self.ended)
        self._on_token(token)

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


def run_generate(
    request: GenerateRequest,
    on_text: OnText = lambda *_: None,
    on_event: Callable[[Event], None] = lambda _: None,
    progress: Progress = lambda _: None,
) -> GenerateReport:
    """Generates, and takes everything down that was started.

    ValueError for a request that does not fit the model; PeerError, WorkerLostError or RuntimeError where a rank is
    lost and the policy does not have it come back.
    """
    progress("reading the prompts")
    tokenizer = load_tokenizer(request.model)
    job = GenerationJob(uuid4().hex, request.model, _tokens(request, tokenizer), request.experts, request.waves)
    stream = TextStream(tokenizer, len(request.prompts))

    def show(token: Token) -> None:
        ids = [] if token.finish == STOP else [token.token]
        for prompt, text, done in stream.add(token.prompt, ids, bool(token.finish)):
            on_text(request.prompts[prompt].id, text, done)

    texts, again = _Texts(job.request, show), _Texts(job.request, lambda _: None)
    with _runner(request, on_event) as run:
        progress(f"loading on {request.ranks} ranks")
        begun = time.monotonic()
        parts = run.generate(job, texts)
        load_s = texts.begun - begun
        if request.check:
            progress("once more on one rank")
            run.on_one_rank()
            run.generate(replace(job, id=uuid4().hex), again)
    found = [[token.token for token in each if token.finish != STOP] for each in texts.tokens]
    share = shared(parts)
    return GenerateReport(
        model=str(request.model),
        launcher=request.launcher,
        ranks=request.ranks,
        prompts=tuple(
            Text(given.id, stream.text(number), tuple(found[number]), texts.tokens[number][-1].finish)
            for number, given in enumerate(request.prompts)
        ),
        new_tokens=texts.new_tokens,
        tokens_per_s=texts.tokens_per_s,
        ttft_ms=texts.ttft_ms,
        tpot_ms=texts.tpot_ms,
        hidden_percent=share.hidden_percent,
        identical=texts.tokens == again.tokens if request.check else None,
        one_rank_tokens_per_s=again.tokens_per_s if request.check else None,
        load_s=load_s,
        events=tuple(event.as_dict() for event in run.events),
    )


def _tokens(request: GenerateRequest, tokenizer: Any) -> GenerationRequest:
    """The request as the ranks take it. ValueError where the model cannot take it, before any rank is started."""
    read_config(request.model)  # says what is wrong with a folder that is no checkpoint
    config = AutoConfig.from_pretrained(request.model, local_files_only=True).get_text_config(decoder=True)
    stops = config.eos_token_id
    generation = request.model / "generation_config.json"
    if generation.is_file():
        stops = json.loads(generation.read_bytes()).get("eos_token_id", stops)
    stop_ids = {stops} if isinstance(stops, int) else set(stops or ())
    if tokenizer.eos_token_id is not None:
        stop_ids.add(tokenizer.eos_token_id)
    made = GenerationRequest(
        encode(request.prompts, tokenizer, raw=request.raw),
        request.max_new_tokens,
        request.sampling,
        frozenset(stop_ids),
    )
    check_fits(made, config.vocab_size, getattr(config, "max_position_embeddings", None))
    return made


class _Cluster:
    """Ranks of a MegaMoECluster."""

    def __init__(self, cluster: MegaMoECluster) -> None:
        self._cluster = cluster

    @property
    def events(self) -> Sequence[Event]:
        return self._cluster.events

    def generate(self, job: GenerationJob, texts: _Texts) -> list[Advance]:
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


class _Torchrun:
    """Ranks of a torchrun that is started for each job."""

    events: Sequence[Event] = ()

    def __init__(self, ranks: int, device: str, deadline_s: float) -> None:
        self._ranks, self._device, self._deadline_s = ranks, device, deadline_s

    def generate(self, job: GenerationJob, texts: _Texts) -> list[Advance]:
        with tempfile.TemporaryDirectory(prefix="megamoe-generate-") as place:
            files, ended = TokenFiles(Path(place), self._ranks, texts.take), threading.Event()
            failed: list[BaseException] = []

            def follow() -> None:
                """Takes tokens as they are written, and loading as over when the first file is there."""
                try:
                    while not ended.wait(0.05):
                        if not texts.new_tokens and not (Path(place) / "tokens-0").exists():
                            texts.begin()
                        files.poll()
                except BaseException as error:  # noqa: BLE001  raised below
                    failed.append(error)

            follower = threading.Thread(target=follow, name="tokens of ranks", daemon=True)
            follower.start()
            try:
                arguments = (generate_in_full, job, self._device, Path(place))
                bound_s = 20 * self._deadline_s
                parts: list[Advance] = run_under_torchrun(
                    self._ranks, *arguments, device=self._device, deadline_s=bound_s
                )
            finally:
                ended.set()
                follower.join()
            if failed:
                raise failed[0]
            files.poll()
        return parts

    def on_one_rank(self) -> None:
        self._ranks = 1


@contextmanager
def _runner(request: GenerateRequest, on_event: Callable[[Event], None]) -> Iterator[_Cluster | _Torchrun]:
    if request.launcher == "torchrun":
        yield _Torchrun(request.ranks, request.device, request.deadline_s)
        return
    with MegaMoECluster(
        request.ranks,
        launcher=request.launcher,
        device=request.device,
        deadline_s=request.deadline_s,
        threads=request.threads,
        run=request.run,
        policy=request.policy,
        on_event=on_event,
    ) as cluster:
        yield _Cluster(cluster)
