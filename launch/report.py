"""The report of a job as a table, the same under any launcher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megamoe.catalog.wording import plural
from megamoe.launch.output import say, show

if TYPE_CHECKING:
    from megamoe.launch.cluster.job import JobReport


def print_report(report: JobReport) -> None:
    """Ranks and what they did, times, the digest of the output."""
    batches = plural(report.batches, "batch", "batches")
    say(f"{report.launcher}: {plural(report.tokens, 'token')} in {batches}, {report.seconds:.2f} s")
    rows = [(each.rank, each.tokens, each.experts, each.read_mb) for each in report.per_rank]
    show({"rank": ">", "tokens": ">", "experts": ">", "read MB": ".1f"}, rows)
    if report.starting:
        took = {name.removesuffix("_s").replace("_", " "): seconds for name, seconds in report.starting.items()}
        until = took.pop("until first batch")
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in took.items())
        say(f"first output after {until:.1f} s ({parts})")
    say(f"output {report.output_sha256}")
