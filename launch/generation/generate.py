"""Texts from a checkpoint on ranks that are started for it: streamed in order, measured, and made again where asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from megamoe.catalog.wording import plural
from megamoe.launch.cluster.cluster import LAUNCHERS, Event, MegaMoECluster
from megamoe.launch.cluster.generation import GenerationJob, shared
from megamoe.launch.cluster.recovery import RestartPolicy
from megamoe.launch.forking.server import MODELS, preload
from megamoe.launch.generation.prompts import Given, TextStream, encode
from megamoe.launch.generation.ranks import OnCluster, Texts, UnderTorchrun
from megamoe.launch.requests import check_seconds, check_system
from megamoe.model.generation.request import STOP, GenerationRequest, Token, check_fits
from megamoe.model.generation.sampling import Sampling
from megamoe.model.loading.files import TensorFiles
from megamoe.model.loading.load import EXPERTS, load_tokenizer
from megamoe.model.loading.skeleton import config_of, read_config
from megamoe.routing.waves import Waves, check_waves

OnText = Callable[[str, str, bool], None]  # prompt's id, more of its text, whether that is all
Progress = Callable[[str], None]


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
        check_seconds("deadline_s", self.deadline_s)
        if self.launcher == "torchrun" and (self.policy.restarts or self.run):
            raise ValueError("under torchrun ranks are not restarted and have no run: use launcher spawn or ray")
        if not self.prompts:
            raise ValueError("there are no prompts")
        if self.experts not in EXPERTS:
            raise ValueError(f"experts must be one of {', '.join(EXPERTS)}, got {self.experts!r}")
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
    events: tuple[Event, ...]


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
    check_system()
    progress("reading the prompts")
    read_config(request.model)  # says what is wrong with a folder that is no checkpoint
    tokenizer = load_tokenizer(request.model)
    with TensorFiles.open(request.model):  # likewise with its files, before any rank is started
        pass
    job = GenerationJob(uuid4().hex, request.model, tokens_of(request, tokenizer), request.experts, request.waves)
    stream = TextStream(tokenizer, len(request.prompts))

    def show(token: Token) -> None:
        ids = [] if token.finish == STOP else [token.token]
        for prompt, text, done in stream.add(token.prompt, ids, bool(token.finish)):
            on_text(request.prompts[prompt].id, text, done)

    texts, again = Texts(job.request, show), Texts(job.request, lambda _: None)
    with _runner(request, on_event) as run:
        progress(f"loading on {plural(request.ranks, 'rank')}")
        begun = time.monotonic()
        parts = run.generate(job, texts)
        load_s = texts.begun - begun
        if request.check:
            progress("once more on one rank")
            run.on_one_rank()
            run.generate(replace(job, id=uuid4().hex), again)
    share = shared(parts)
    return GenerateReport(
        model=str(request.model),
        launcher=request.launcher,
        ranks=request.ranks,
        prompts=tuple(
            Text(given.id, stream.text(number), texts.token_ids(number), texts.tokens[number][-1].finish)
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
        events=tuple(run.events),
    )


def tokens_of(request: GenerateRequest, tokenizer: Any) -> GenerationRequest:
    """The request as the ranks take it. ValueError where the model cannot take it, before any rank is started."""
    config = config_of(request.model).get_text_config(decoder=True)
    stops = config.eos_token_id
    generation = request.model / "generation_config.json"
    if generation.is_file():
        stops = json.loads(generation.read_bytes()).get("eos_token_id", stops)
    stop_ids = {stops} if isinstance(stops, int) else set(stops or ())
    if tokenizer.eos_token_id is not None:
        stop_ids.add(tokenizer.eos_token_id)
    prompts = encode(request.prompts, tokenizer, raw=request.raw)
    made = GenerationRequest(prompts, request.max_new_tokens, request.sampling, frozenset(stop_ids))
    check_fits(made, config.vocab_size, getattr(config, "max_position_embeddings", None))
    return made


@contextmanager
def _runner(request: GenerateRequest, on_event: Callable[[Event], None]) -> Iterator[OnCluster | UnderTorchrun]:
    if request.launcher == "torchrun":
        yield UnderTorchrun(request.ranks, request.device, request.deadline_s)
        return
    preload(MODELS)
    asked: dict[str, Any] = {
        name: getattr(request, name) for name in ("launcher", "device", "deadline_s", "threads", "run", "policy")
    }
    with MegaMoECluster(request.ranks, on_event=on_event, **asked) as cluster:
        yield OnCluster(cluster)
