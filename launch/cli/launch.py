"""megamoe launch: a text through a checkpoint on ranks of this machine, or of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megamoe.launch.output import Output, emit, note
from megamoe.launch.report import print_report
from megamoe.launch.terminal import Format, exit_codes, parse_waves, progress

if TYPE_CHECKING:
    from megamoe.launch.cluster.cluster import Event


def launch(
    ranks: Annotated[int, typer.Option(help="Processes that share the experts, a device each.")] = 2,
    ray: Annotated[
        str | None,
        typer.Option(
            help='Ray cluster to run on: its address, "auto" for this machine\'s (one is started where there is none), '
            'or "local" for one of its own. Without it ranks are processes of this machine.'
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="DeepSeek-V4 checkpoint to run; a small one is written and removed without.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to run; a chapter of Alice by default.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of all ranks together in a batch; all in one batch by default.")
    ] = None,
    repeat: Annotated[int, typer.Option(help="How often the text is run.")] = 1,
    waves: Annotated[str, typer.Option(help='A number, relative sizes such as 1,2,1, or "auto".')] = "auto",
    dispatch_format: Annotated[str, typer.Option(help="mxfp8, bf16 or auto: how tokens travel.")] = "mxfp8",
    combine_format: Annotated[str, typer.Option(help="bf16 or mxfp8: how results travel home.")] = "bf16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or npu; what there is by default.")] = None,
    interface: Annotated[
        str | None, typer.Option(help="Network interface of ranks on this machine; loopback by default.")
    ] = None,
    deadline_s: Annotated[float, typer.Option(help="Seconds that a rank may be kept waiting in one call.")] = 60.0,
    restarts: Annotated[int, typer.Option(help="How often the group comes back after a rank is lost.")] = 0,
    backoff_s: Annotated[
        float, typer.Option(help="Wait before a restart; doubled for each further one in a row.")
    ] = 0.5,
    elastic: Annotated[
        str | None,
        typer.Option(help="MIN:MAX ranks: goes on with fewer where a rank cannot come back, and grows again."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run, for megamoe doctor --run.")] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder in which worker-0.log, worker-1.log, ... keep what ranks print.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help='Safetensors file for the output, "hidden" [T, H].')] = None,
    output: Output = Format.table,
) -> None:
    """Run a text through a checkpoint's expert layers, in batches, on ranks that are started for it."""
    with exit_codes():
        with progress() as bar:
            task = bar.add_task("starting", total=None)
            from megamoe.launch.cluster.recovery import RestartPolicy, parse_elastic
            from megamoe.launch.devices import present_device
            from megamoe.launch.launch import LaunchRequest, run_launch  # brings torch, which --help does not need

            request = LaunchRequest(
                ranks=ranks,
                ray=ray,
                checkpoint=checkpoint,
                text=text,
                waves=parse_waves(waves),
                dispatch_format=dispatch_format,
                combine_format=combine_format,
                batch_tokens=batch_tokens,
                repeat=repeat,
                device=device or present_device(),
                interface=interface,
                deadline_s=deadline_s,
                run=run,
                log_dir=log_dir,
                out=out,
                policy=RestartPolicy(restarts, backoff_s, None if elastic is None else parse_elastic(elastic)),
            )
            report = run_launch(
                request, _say, lambda what, done, of: bar.update(task, description=what, completed=done, total=of)
            )
        emit(output, report, lambda: print_report(report))


def _say(event: Event) -> None:
    """What happens to the group, as it happens, beside the ranks' own lines."""
    note(f"{event.at_s:7.1f} s  {event.kind}: {event.what}")
