"""megamoe launch: a text through a checkpoint on ranks of this machine, or of a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.launch.cli.flags import flag, takes
from megamoe.launch.output import Output, emit, note
from megamoe.launch.terminal import Bar, Format, exit_codes, parse_waves

if TYPE_CHECKING:
    from megamoe.launch.cluster.cluster import Event


FLAGS = {  # by the names of LaunchRequest
    "ranks": flag(int, "Processes that share the experts, a device each.", 2),
    "ray": flag(
        str | None,
        'Ray cluster to run on: its address, "auto" for this machine\'s (one is started where there is none), or '
        '"local" for one of its own. Without it ranks are processes of this machine.',
    ),
    "checkpoint": flag(Path | None, "DeepSeek-V4 checkpoint to run; a small one is written and removed without."),
    "text": flag(Path | None, "UTF-8 text to run; a chapter of Alice by default."),
    "batch_tokens": flag(int | None, "Tokens of all ranks together in a batch; all in one batch by default."),
    "repeat": flag(int, "How often the text is run.", 1),
    "dispatch_format": flag(str, "mxfp8, bf16 or auto: how tokens travel.", "mxfp8"),
    "combine_format": flag(str, "bf16 or mxfp8: how results travel home.", "bf16"),
    "interface": flag(str | None, "Network interface of ranks on this machine; loopback by default."),
    "deadline_s": flag(float, "Seconds that a rank may be kept waiting in one call.", 60.0),
    "run": flag(str | None, "Name of the run, for megamoe doctor --run."),
    "log_dir": flag(Path | None, "Folder in which worker-0.log, worker-1.log, ... keep what ranks print."),
    "out": flag(Path | None, 'Safetensors file for the output, "hidden" [T, H].'),
}


@takes(FLAGS)
def launch(
    given: dict[str, Any],
    waves: Annotated[str, typer.Option(help='A number, relative sizes such as 1,2,1, or "auto".')] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or npu; what there is by default.")] = None,
    restarts: Annotated[int, typer.Option(help="How often the group comes back after a rank is lost.")] = 0,
    backoff_s: Annotated[
        float, typer.Option(help="Wait before a restart; doubled for each further one in a row.")
    ] = 0.5,
    elastic: Annotated[
        str | None,
        typer.Option(help="MIN:MAX ranks: goes on with fewer where a rank cannot come back, and grows again."),
    ] = None,
    output: Output = Format.table,
) -> None:
    """Run a text through a checkpoint's expert layers, in batches, on ranks that are started for it."""
    with exit_codes():
        with Bar() as bar:
            from megamoe.launch.cluster.job import print_report
            from megamoe.launch.cluster.recovery import RestartPolicy, parse_elastic
            from megamoe.launch.devices import present_device
            from megamoe.launch.launch import LaunchRequest, run_launch  # brings torch, which --help does not need

            parsed: Any = parse_waves(waves)
            policy = RestartPolicy(restarts, backoff_s, None if elastic is None else parse_elastic(elastic))
            request = LaunchRequest(**given, waves=parsed, device=device or present_device(), policy=policy)
            report = run_launch(request, say_event, bar.follow)
        emit(output, report, lambda: print_report(report))


def say_event(event: Event) -> None:
    """What happens to the group, as it happens, beside the ranks' own lines."""
    note(f"{event.at_s:7.1f} s  {event.kind}: {event.what}")
