"""The report of a job as a table, the same under any launcher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from megamoe.launch.terminal import stdout

if TYPE_CHECKING:
    from megamoe.launch.cluster.job import JobReport


def print_report(report: JobReport) -> None:
    """Ranks and what they did, times, the digest of the output."""
    of = f"{report.batches} batch{'' if report.batches == 1 else 'es'}"
    title = f"{report.launcher}: {report.tokens} tokens in {of}, {report.seconds:.2f} s"
    stdout.print(title, highlight=False, markup=False, soft_wrap=True)
    table = Table(padding=(0, 0), box=box.SIMPLE_HEAD)
    for heading in ("rank", "tokens", "experts", "read MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in report.per_rank:
        table.add_row(str(each.rank), str(each.tokens), str(each.experts), f"{each.read_mb:.1f}")
    stdout.print(table)
    if report.starting:
        took = {name.removesuffix("_s").replace("_", " "): seconds for name, seconds in report.starting.items()}
        until = took.pop("until first batch")
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in took.items())
        stdout.print(f"first output after {until:.1f} s ({parts})", highlight=False, soft_wrap=True)
    stdout.print(f"output {report.output_sha256}", highlight=False, soft_wrap=True)
