"""The worker under torchrun: python -m megamoe.launch.worker, once for every rank, with torch's own rendezvous."""

# T tokens of all ranks   H hidden

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from megamoe.catalog.wording import plural
from megamoe.launch.cluster.job import (
    JobReport,
    RankWork,
    batches,
    check_vocabulary,
    digest,
    print_report,
    read_text,
    share,
    tokenise,
)
from megamoe.launch.cluster.worker import Load, LoadReport, Worker, WorkerOptions
from megamoe.launch.devices import DEVICE_TYPES, device_of, device_type, num_devices, present_device
from megamoe.launch.output import Output, check_folder, emit
from megamoe.launch.process import share_of_cores
from megamoe.launch.terminal import Format, exit_codes, parse_waves, with_homes
from megamoe.model.deepseek_v4.config import DeepSeekV4Config
from megamoe.model.loading.files import write_tensors
from megamoe.parallel.group import EPGroup
from megamoe.parallel.interfaces import Interface, choose, told
from megamoe.parallel.transport.pairs import Label

_START = "torchrun --nproc-per-node N -m megamoe.launch.worker ..."


@dataclass(frozen=True, slots=True)
class Place:
    """Which rank this process is, as torchrun's environment says.

    local_rank, local_size   among the ranks of this machine
    master                   name or address of the machine of rank 0
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    master: str

    @classmethod
    def read(cls) -> Place:
        """ValueError for an environment that is not torchrun's, with what is missing."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise ValueError(f"the environment lacks {', '.join(missing)}: start it with {_START}")
        for name in names:
            if name != "MASTER_ADDR" and not os.environ[name].isdecimal():
                raise ValueError(f"{name} must be a number, got {os.environ[name]!r}: start it with {_START}")
        rank, size, local_rank, local_size = (int(os.environ[name]) for name in names[:4])
        return cls(rank, size, local_rank, local_size, os.environ["MASTER_ADDR"])


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be run: texts, checkpoint and how. Checked here, before anything is started."""

    load: Load
    batches: list[Sequence[int]]
    out: Path | None

    @classmethod
    def of(cls, load: Load, text: Path | None, batch_tokens: int | None, out: Path | None) -> Job:
        """ValueError for a text or checkpoint that cannot be used, and for a file that could not be written."""
        if out is not None:
            check_folder(out)
        token_ids = tokenise(read_text(text)[0])
        check_vocabulary(token_ids, DeepSeekV4Config.read(load.checkpoint))
        return cls(load, batches(token_ids, batch_tokens), out)


def worker(
    checkpoint: Annotated[Path, typer.Option(help="DeepSeek-V4 checkpoint to run.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to run; a chapter of Alice by default.")] = None,
    waves: Annotated[str, typer.Option(help='A number, relative sizes such as 1,2,1, or "auto".')] = "auto",
    dispatch_format: Annotated[str, typer.Option(help="mxfp8, bf16 or auto: how tokens travel.")] = "mxfp8",
    combine_format: Annotated[str, typer.Option(help="bf16 or mxfp8: how results travel home.")] = "bf16",
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of all ranks together in a batch; all in one batch by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or npu; what there is by default.")] = None,
    interface: Annotated[
        str | None, typer.Option(help="Network interface to use; the one towards rank 0 by default.")
    ] = None,
    deadline_s: Annotated[float, typer.Option(help="Seconds that any wait may take.")] = 60.0,
    out: Annotated[Path | None, typer.Option(help='Safetensors file for the output, "hidden" [T, H].')] = None,
    output: Output = Format.table,
) -> None:
    """Run a text through a checkpoint's expert layers as one rank of those that torchrun starts."""
    with exit_codes():
        place = Place.read()
        load = Load(checkpoint, parse_waves(waves), dispatch_format, combine_format)
        job = Job.of(load, text, batch_tokens, out)
        options = torchrun_options(device or present_device(), place, interface, deadline_s)
        report, hidden = run_job(job, place, options)
        if report is None:
            return
        if out is not None:
            write_tensors({"hidden": hidden}, out)
        emit(output, report, lambda: print_report(report))


def torchrun_options(device: str, place: Place, interface: str | None, deadline_s: float) -> WorkerOptions:
    """Also tells the backends which interface to use, in the only way that they can be told."""
    device_type(device)
    through = _interface(device, place, interface)
    settings = [each.interface_setting(through.name) for each in (DEVICE_TYPES["cpu"], device_type(device))]
    if device != "cpu" and num_devices(device) <= place.local_rank:
        raise ValueError(
            f"{plural(place.local_size, 'rank')} on this machine need{'s' * (place.local_size == 1)} as many {device} "
            f"devices, it has {num_devices(device)}"
        )
    for setting in settings:
        os.environ.update(setting)
    return WorkerOptions(
        device=device_of(device, place.local_rank),
        address=through.address,
        interface=through.name,
        threads=share_of_cores(place.local_size),
        deadline_s=deadline_s,
    )


def _interface(device: str, place: Place, name: str | None) -> Interface:
    """The one that is named, else the one that the environment tells a backend, else the one towards rank 0.

    Where that is loopback though ranks are on other machines too, rank 0's own hosts file has its name stand for
    127.0.1.1, as Debian's does: then the obvious one.
    """
    if name is not None:
        return choose(name=name)
    said = told(device) or told("cpu")
    if said is not None:
        return said
    master = _address(place.master)
    elsewhere = place.local_size < place.size and ip_address(master).is_loopback
    return choose() if elsewhere else choose(master)


def _address(master: str) -> str:
    try:
        found = socket.getaddrinfo(master, None, type=socket.SOCK_STREAM)
    except OSError as unknown:
        raise ValueError(f"MASTER_ADDR {master!r} has no address: {unknown.strerror}") from unknown
    return str(found[0][4][0])


def run_job(job: Job, place: Place, options: WorkerOptions) -> tuple[JobReport | None, Tensor]:
    """This rank's part of the job -> on rank 0 the report and the output [T, H] bfloat16, else None and [0, H]."""
    worker = Worker(options)
    try:
        worker.join_torchrun(place.rank, place.size)
        loaded = worker.load(job.load)
        outputs, waves, tokens, begun = [], 0, 0, time.perf_counter()
        for batch in job.batches:
            mine = share(batch, place.rank, place.size)
            hidden, done = worker.forward(mine)
            outputs.append(worker.run(_collect, hidden, options.device, len(batch)))
            waves, tokens = max(waves, done.waves), tokens + len(mine)
        seconds = time.perf_counter() - begun
        per_rank = worker.run(_collect_work, loaded, tokens)
    finally:
        worker.leave()
    together = torch.cat(outputs)
    if place.rank:
        return None, together
    return (
        JobReport(
            launcher="torchrun",
            ranks=place.size,
            batches=len(job.batches),
            tokens=len(together),
            output_sha256=digest(together),
            seconds=seconds,
            waves=waves,
            per_rank=per_rank,
        ),
        together,
    )


def _collect(group: EPGroup, hidden: Tensor, device: str, num_tokens: int) -> Tensor:
    """Every rank's part of a batch's output -> on rank 0 [T, H] in order of rank, [0, H] elsewhere."""
    transport, first = group.transport, not group.rank
    if transport is None:
        return hidden
    counts = [len(share(range(num_tokens), rank, group.size)) if first else 0 for rank in range(group.size)]
    there = hidden.new_empty(sum(counts), hidden.shape[1], device=device)
    transfer = transport.expect(there, counts, Label("output", "combine", 0))
    transfer.send(hidden.to(device), [0 if rank else len(hidden) for rank in range(group.size)])
    transfer.wait()
    transfer.finish()
    if first:
        there[: len(hidden)] = hidden  # which a transport of pairs does not send to itself
    return there.cpu()


def _collect_work(group: EPGroup, loaded: LoadReport, tokens: int) -> list[RankWork]:
    """What every rank did, in order of rank."""
    mine = torch.tensor([tokens, loaded.experts_kept + loaded.experts_read, loaded.bytes_read])
    pages = mine.view(torch.uint8)[None]
    if group.transport is not None:
        pages = group.transport.gather(pages[0], Label("report", "counts"))
    rows = pages.view(torch.int64).tolist()
    return [RankWork(rank, tokens, experts, read / 1e6) for rank, (tokens, experts, read) in enumerate(rows)]


def main() -> None:
    """Entry point of python -m megamoe.launch.worker."""
    typer.run(with_homes(worker))
