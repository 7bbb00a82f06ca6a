"""Every family of transformers with expert-parallel experts on the layer: python -m benchmarks.transformers_families"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date

import torch
import transformers

from benchmarks.command import new_file
from benchmarks.transformers_families.compare import BOUND, Row, compare
from benchmarks.transformers_families.tiny import RULE, families
from megamoe.launch.ranks import LocalRanks

COMMAND = "python -m benchmarks.transformers_families --write docs/transformers.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every family works or is refused, 1 where one computes something else."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformers_families", description=__doc__)
    parser.add_argument("--families", default="", help="names, separated by commas; all by default")
    parser.add_argument("--write", type=new_file, help="the page to write")
    asked = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = families(list(filter(None, asked.families.split(","))))
    rows = []
    with LocalRanks(2, threads_per_rank=1, deadline_s=120) as ranks:
        for family in chosen:
            rows.append(compare(family, ranks))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    page = _page(rows)
    print(page)
    if asked.write:
        asked.write.write_text(page)
    return 1 if any(row.wrong for row in rows) else 0


def _page(rows: list[Row]) -> str:
    return INTRO.format(
        version=transformers.__version__,
        rule=RULE,
        families=len(rows),
        works=sum(row.works for row in rows),
        refused=sum(bool(row.refusal) for row in rows),
        failed=sum(bool(row.failure) for row in rows),
        wrong=sum(row.wrong for row in rows),
        command=COMMAND,
        day=date.today(),
        torch=torch.__version__,
        bound=BOUND,
    ) + "".join(f"{_line(row)}\n" for row in rows)


def _line(row: Row) -> str:
    if row.refusal or row.failure:
        return f"| {row.family} | {'refused: ' + row.refusal if row.refusal else 'not run: ' + row.failure} | | | | | |"
    wrong = "" if row.works else " **wrong**"
    numbers = f"{row.experts:.4f}{wrong} | {row.output:.3f} | {row.theirs:.3f} | {row.plain:.3f}"
    return f"| {row.family} | {row.activation} | {numbers} | {row.layout} |"


INTRO = """# Families of transformers on the layer

Every architecture of transformers {version} with the `{rule}` rule: a tiny random model of each, loaded by
stock `from_pretrained` on two gloo ranks with `ep_implementation="megamoe"`, against one plain process with the same
weights. Of {families} families {works} work; refused: {refused}, not run: {failed}, wrong: {wrong}. This page is
written by `{command}`
({day}, torch {torch}, CPU).

- **activation**: what the probe found of the model's own experts.
- **experts**: relative error of an experts module that is fed with what the plain one was fed, the largest of the
  model's modules and ranks; a family works below {bound:g}.
- **output**: relative error of the model's output against the plain model in FP32; **theirs** with transformers' own
  `all_to_all` in place of the layer; **plain** without ranks. A router in BF16 now and then chooses another expert for
  a token when its input differs by a rounding, which these three show and the first column does not.
- **dense**: how transformers lays out dense weights, and their dtype. `fsdp` is a batch for each rank, `tp` one for
  all. The first of `fsdp, bfloat16`, `tp, bfloat16` and `fsdp, float32` that transformers runs the family in.

| family | activation | experts | output | theirs | plain | dense |
|---|---|---|---|---|---|---|
"""
