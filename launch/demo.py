"""The main job on any machine: real text through FP4 experts on several ranks, then on one, and are they identical?

It ends with a question, which a model answers on all ranks and on one.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor

from megamoe.execution.journeys import CallRecord
from megamoe.launch.cluster.cluster import LAUNCHERS, MegaMoECluster
from megamoe.launch.cluster.job import check_vocabulary, read_text, share, tokenise
from megamoe.launch.cluster.torchrun_work import run_under_torchrun
from megamoe.launch.forking.server import MODELS, preload
from megamoe.launch.requests import check_seconds, check_system
from megamoe.model.deepseek_v4.blocks import ExpertStack
from megamoe.model.deepseek_v4.checkpoint import Checkpoint
from megamoe.model.deepseek_v4.config import DeepSeekV4Config
from megamoe.model.deepseek_v4.synthetic import SMALL, num_steps, write_checkpoint
from megamoe.parallel.group import EPGroup
from megamoe.routing.waves import Waves, check_waves

if TYPE_CHECKING:
    from megamoe.launch.generation.answer import AnswerReport

Progress = Callable[[str, int, int], None]  # what is being done, how many steps are done, of how many


@dataclass(frozen=True, slots=True)
class Request:
    """What the demo is asked for; text None takes the one that comes with the package, checkpoint None a new one.

    question   "" asks none; nor is one asked where transformers is not installed
    """

    ranks: int = 4
    text: Path | None = None
    waves: Waves = 4
    checkpoint: Path | None = None
    deadline_s: float = 120.0
    launcher: str = "spawn"
    question: str = ""

    def __post_init__(self) -> None:
        if self.launcher not in (*LAUNCHERS, "torchrun"):
            raise ValueError(f"launcher must be ray, spawn or torchrun, got {self.launcher!r}")
        if self.ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}")
        check_seconds("deadline_s", self.deadline_s)
        check_waves(self.waves)


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank did in one forward through all layers. Times are sums over the layers."""

    rank: int
    tokens: int
    experts: int
    expert_mb: float
    read_mb: float
    rows_local: int
    rows_received: int
    bytes_sent: int
    waves: int
    compute_ms: float
    waiting_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """identical: whether every bit of the output is the same on all ranks together and on one.

    answer   None where no question was asked
    """

    launcher: str
    ranks: list[RankReport]
    one_rank: RankReport
    text: str
    tokens: int
    layers: int
    num_experts: int
    topk: int
    hidden: int
    intermediate: int
    identical: bool
    answer: AnswerReport | None


def run_demo(request: Request, progress: Progress = lambda *_: None) -> DemoReport:
    """Writes a checkpoint unless one is given, runs the text through it on request.ranks ranks and on one."""
    check_system()
    progress("reading the text", 0, 1)
    text, source = read_text(request.text)
    token_ids = tokenise(text)
    with ExitStack() as stack:
        path, config = stack.enter_context(checkpoint_or_small(request.checkpoint, progress))
        check_vocabulary(token_ids, config)
        question = stack.enter_context(_asked(request, progress))
        ranks = stack.enter_context(_ranks(request))
        work = (run_rank, path, token_ids, request.waves)
        together, alone, answer = _compare(request, ranks, work, question, progress)
    progress("comparing", 1, 1)
    output = torch.cat([part for part, _ in together])
    return DemoReport(
        launcher=request.launcher,
        ranks=[report for _, report in together],
        one_rank=alone[0][1],
        text=source,
        tokens=len(token_ids),
        layers=config.num_hidden_layers,
        num_experts=config.n_routed_experts,
        topk=config.num_experts_per_tok,
        hidden=config.hidden_size,
        intermediate=config.moe_intermediate_size,
        identical=torch.equal(output.view(torch.int16), alone[0][0].view(torch.int16)),
        answer=answer,
    )


@contextmanager
def _asked(request: Request, progress: Progress) -> Iterator[tuple[Any, str, bool] | None]:
    """The question to its model, what that is, and whether it stays; None where none is asked."""
    if not request.question or find_spec("transformers") is None:
        yield None
        return
    from megamoe.launch.generation.answer import Answering, model_for_answers  # here because it brings transformers

    preload(MODELS)
    progress("reading the model that answers", 0, 1)
    with model_for_answers(progress) as (path, model, stays):
        yield Answering(request.question, path), model, stays


@contextmanager
def _ranks(request: Request) -> Iterator[MegaMoECluster | None]:
    """The ranks, which stay from one work to the next; None under torchrun, which starts them for each."""
    if request.launcher == "torchrun":
        yield None
        return
    bounds = {"deadline_s": request.deadline_s, "batch_deadline_s": request.deadline_s}
    with MegaMoECluster(request.ranks, launcher=request.launcher, **bounds) as cluster:  # type: ignore[arg-type]
        yield cluster


def _compare(
    request: Request,
    cluster: MegaMoECluster | None,
    work: tuple[Any, ...],
    asked: tuple[Any, str, bool] | None,
    progress: Progress,
) -> tuple[list[Any], list[Any], AnswerReport | None]:
    """The work and the question on all ranks, and then on one: results of both, and the answer."""
    found, answers = list[list[Any]](), list[Any]()
    steps = 2 + 2 * (asked is not None)
    for ranks in (request.ranks, 1):
        on = f"on {ranks} ranks" if ranks > 1 else "on one rank"
        progress(f"running the text {on}", len(found) + len(answers), steps)
        if cluster is None:
            found.append(run_under_torchrun(ranks, *work, deadline_s=request.deadline_s))
        else:
            if cluster.ranks != ranks:
                cluster.resize(ranks)
            found.append(cluster.run(*work))
        if asked is not None:
            progress(f"answering {on}", len(found) + len(answers), steps)
            answers.append(_answered(asked[0], cluster, ranks, request.deadline_s))
    together, alone = found
    if asked is None:
        return together, alone, None
    question, model, stays = asked
    return together, alone, question.report(*answers, model, stays)


def _answered(question: Any, cluster: MegaMoECluster | None, ranks: int, deadline_s: float) -> Any:
    from megamoe.launch.generation.ranks import OnCluster, UnderTorchrun  # here because it brings transformers

    return question.on(UnderTorchrun(ranks, "cpu", deadline_s) if cluster is None else OnCluster(cluster))


def run_rank(group: EPGroup, path: Path, token_ids: list[int], waves: Waves) -> tuple[Tensor, RankReport]:
    """A rank's work: reads its own experts, runs its share of the tokens twice, and reports the second time."""
    mine = torch.tensor(share(token_ids, group.rank, group.size), dtype=torch.int64)
    with Checkpoint.open(path) as checkpoint:
        hidden = checkpoint.embedding(mine)
        model = ExpertStack.load(checkpoint, group, waves=waves)
        read_mb = checkpoint.bytes_read / 1e6
    model(hidden, mine)  # builds what is built once
    begun = time.perf_counter()
    out = model(hidden, mine)
    total_s = time.perf_counter() - begun
    done = sum(model.calls, CallRecord())
    report = RankReport(
        rank=group.rank,
        tokens=len(mine),
        experts=model.num_local_experts,
        expert_mb=model.expert_bytes / 1e6,
        read_mb=read_mb,
        rows_local=done.rows_local,
        rows_received=done.rows_received,
        bytes_sent=done.bytes_sent,
        waves=done.waves,
        compute_ms=done.compute_s * 1e3,
        waiting_ms=(done.waiting_s + done.counts_s) * 1e3,
        total_ms=total_s * 1e3,
    )
    return out, report


@contextmanager
def checkpoint_or_small(given: Path | None, progress: Progress) -> Iterator[tuple[Path, DeepSeekV4Config]]:
    """The checkpoint to run: the given one, written there if the folder is new; else one that is removed after."""
    if given is not None:
        if not given.exists():
            with _removed_unless_done(given):
                _write(given, progress)
        yield given, DeepSeekV4Config.read(given)
        return
    # the name is known before the folder exists, so that no interruption can leave it behind
    path = Path(tempfile.gettempdir()) / f"megamoe-demo-{uuid4().hex}"
    try:
        _write(path, progress)
        yield path, SMALL
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _removed_unless_done(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _write(path: Path, progress: Progress) -> None:
    steps = num_steps(SMALL)
    done = 0

    def step(_: str) -> None:
        nonlocal done
        done += 1
        progress("writing the checkpoint", done, steps)

    progress("writing the checkpoint", 0, steps)
    write_checkpoint(path, SMALL, progress=step)
