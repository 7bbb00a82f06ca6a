"""A text through a checkpoint, in batches, on ranks that are started for it and that come back if they are to."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.catalog.wording import plural
from megamoe.execution.checks import check_wire
from megamoe.launch.cluster.cluster import Event, MegaMoECluster
from megamoe.launch.cluster.job import (
    JobReport,
    RankWork,
    batches,
    check_vocabulary,
    digest,
    read_text,
    share,
    tokenise,
)
from megamoe.launch.cluster.recovery import RestartPolicy
from megamoe.launch.demo import checkpoint_or_small
from megamoe.launch.output import check_folder
from megamoe.launch.process import age_s
from megamoe.launch.requests import check_seconds, check_system
from megamoe.model.loading.files import write_tensors
from megamoe.parallel.health.runs import check_name
from megamoe.routing.waves import Waves, check_waves

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What `megamoe launch` is asked for.

    ray            address of a Ray cluster, "auto" or "local"; None starts processes of this machine
    checkpoint     None writes a small one and removes it
    batch_tokens   of all ranks together; None is one batch of the whole text
    repeat         how often the text is run
    """

    ranks: int
    ray: str | None = None
    checkpoint: Path | None = None
    text: Path | None = None
    waves: Waves = "auto"
    dispatch_format: str = "mxfp8"
    combine_format: str = "bf16"
    batch_tokens: int | None = None
    repeat: int = 1
    device: str = "cpu"
    interface: str | None = None
    deadline_s: float = 60.0
    run: str | None = None
    log_dir: Path | None = None
    out: Path | None = None
    policy: RestartPolicy = field(default_factory=RestartPolicy)

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}")
        if self.checkpoint is not None and not self.checkpoint.exists():
            raise ValueError(f"there is no checkpoint {self.checkpoint}: leave it out for a small one")
        if self.repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {self.repeat}")
        check_seconds("deadline_s", self.deadline_s)
        if self.ray is not None and self.interface is not None:
            raise ValueError("interface is for ranks of this machine: Ray's nodes use the one of their own address")
        if self.out is not None:
            check_folder(self.out)
        if self.run is not None:
            check_name(self.run)
        check_waves(self.waves)
        check_wire(self.dispatch_format, self.combine_format)


def run_launch(
    request: LaunchRequest, on_event: Callable[[Event], None] = lambda _: None, progress: Progress = lambda *_: None
) -> JobReport:
    """Runs it and takes everything down. What MegaMoECluster raises, where the group cannot come back."""
    check_system()
    begun = time.monotonic()
    token_ids = tokenise(read_text(request.text)[0])
    with checkpoint_or_small(request.checkpoint, progress) as (path, config):
        check_vocabulary(token_ids, config)
        jobs = batches(token_ids, request.batch_tokens) * request.repeat
        prepared_s = time.monotonic() - begun
        progress(f"starting {plural(request.ranks, 'rank')}", 0, len(jobs))
        with _cluster(request, on_event) as cluster:
            cluster.load(
                path,
                waves=request.waves,
                dispatch_format=request.dispatch_format,
                combine_format=request.combine_format,
            )
            report, output = _run(cluster, jobs, progress)
    if request.out is not None:
        write_tensors({"hidden": output}, request.out)
    return replace(report, starting={"preparation_s": prepared_s, **report.starting})


def _cluster(request: LaunchRequest, on_event: Callable[[Event], None]) -> MegaMoECluster:
    asked: dict[str, Any] = {
        name: getattr(request, name) for name in ("device", "deadline_s", "interface", "run", "log_dir", "policy")
    }
    launcher = "spawn" if request.ray is None else "ray"
    return MegaMoECluster(request.ranks, launcher=launcher, address=request.ray, on_event=on_event, **asked)


def _run(cluster: MegaMoECluster, jobs: list[Sequence[int]], progress: Progress) -> tuple[JobReport, Tensor]:
    """All batches -> the report, and the output [T, H] bfloat16 of all of them."""
    outputs, waves, tokens = [], 0, [0] * cluster.most
    begun = time.monotonic()
    first_s = until_first_s = 0.0
    for number, batch in enumerate(jobs):
        progress(f"batch {number + 1} on {plural(cluster.ranks, 'rank')}", number, len(jobs))
        outputs.append(cluster.forward(batch))
        if not number:
            first_s, until_first_s = time.monotonic() - begun, age_s()
        waves = max(waves, *(call.waves for call in cluster.last_calls))
        for rank in range(cluster.ranks):
            tokens[rank] += len(share(batch, rank, cluster.ranks))
    seconds = time.monotonic() - begun
    output = torch.cat(outputs)
    starting = {**asdict(cluster.starting), "first_batch_s": first_s, "until_first_batch_s": until_first_s}
    work = [
        RankWork(rank, tokens[rank], load.experts_kept + load.experts_read, load.bytes_read / 1e6)
        for rank, load in enumerate(cluster.loads)
    ]
    return (
        JobReport(
            launcher=cluster.launcher,
            ranks=cluster.ranks,
            batches=len(jobs),
            tokens=len(output),
            output_sha256=digest(output),
            seconds=seconds,
            waves=waves,
            per_rank=work,
            starting=starting,
            events=[asdict(event) for event in cluster.events],
        ),
        output,
    )
