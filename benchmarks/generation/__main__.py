"""Generation on ranks, this package beside transformers' own expert parallelism: tokens per second and memory.

python -m benchmarks.generation                              # both links; root and iproute2 for the shaped one
python -m benchmarks.generation --only loopback --contenders "all_reduce, grouped;megamoe" --repeats 3
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch

from benchmarks.command import new_file, positive, run
from benchmarks.generation.checkpoint import Sizes, described, vocabulary_of, write_model
from benchmarks.generation.contenders import Contender, choose
from benchmarks.generation.ranks import load_model, ranks_of, write
from benchmarks.generation.report import Comparison, Series, Workload, document
from benchmarks.peers.report import machine, versions
from megamoe.launch.lab.namespaces import lab
from megamoe.launch.process import loopback
from megamoe.paths import path_of

LINKS = {"1gbit": "1gbit", "loopback": None}
_WARM_UP = 2  # rounds not counted: the first call of a layer measures links and packs what it needs


def compare(
    path: Path, workload: Workload, contenders: Sequence[Contender], repeats: int, vocabulary: int
) -> Comparison:
    """All contenders' rounds on one workload. One that does not run has a problem, and the others go on."""
    rng = torch.Generator().manual_seed(1)
    prompts = [torch.randint(vocabulary, (length,), generator=rng).tolist() for length in workload.lengths]
    found = [Series(each) for each in contenders]
    with ExitStack() as stack:
        hosts = stack.enter_context(
            nullcontext([loopback()] * workload.ranks) if workload.link is None else lab(workload.ranks, workload.link)
        )
        ranks = [stack.enter_context(ranks_of(hosts)) for _ in found]
        for each, series in zip(ranks, found, strict=True):
            with series.problems():
                each.run(load_model, series.contender, path)
        for round_number in range(-_WARM_UP, repeats):
            for each, series in zip(ranks, found, strict=True):
                if series.problem:
                    continue
                with series.problems():
                    written = each.run(write, prompts, workload.new_tokens)
                    if round_number >= 0:
                        series.add(workload, [passage for passage, _ in written])
                        series.memory_mb = max(memory_mb for _, memory_mb in written)
    return Comparison(workload, repeats, tuple(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 1 where one of ours does not run, or gives other texts; 2 for a bad request."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    asked = parser.parse_args(given)
    if asked.new_tokens < 2:
        parser.error(f"--new-tokens must be at least 2, one to begin with and one to decode, got {asked.new_tokens}")
    comparisons: list[Comparison] = []
    sizes = Sizes(layers=asked.layers)
    with tempfile.TemporaryDirectory(prefix="megamoe-generation-") as place:
        try:
            contenders = choose(asked.contenders)
            path, model = asked.model, ""
            if path is None:
                path, model = Path(place) / "model", sizes.text
                write_model(path, sizes)
            for name, link in LINKS.items():
                if asked.only and name not in asked.only:
                    continue
                workload = Workload((asked.tokens,) * asked.prompts, asked.new_tokens, asked.ranks, link)
                print(f"{workload.title} ...", file=sys.stderr, flush=True)
                comparisons.append(compare(path, workload, contenders, asked.repeats, vocabulary_of(path)))
                if asked.format == "table":
                    print(f"\n{workload.title}, {asked.repeats} rounds\n\n{comparisons[-1].table()}", flush=True)
        except ValueError as refusal:
            parser.error(str(refusal))
        model = model or described(path)
    command = shlex.join(["python", "-m", "benchmarks.generation", *given])
    if asked.format == "json":
        print(
            json.dumps(
                {
                    "command": command,
                    "date": datetime.date.today().isoformat(),
                    "machine": machine(),
                    "versions": versions(),
                    "model": model,
                    "results": [each.as_dict() for each in comparisons],
                },
                indent=2,
            )
        )
    if asked.write:
        asked.write.write_text(document(command, model, comparisons))
    raise SystemExit(int(any(each.failed for each in comparisons)))


def _parser() -> argparse.ArgumentParser:
    purpose = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=purpose)
    parser.add_argument("--repeats", type=positive, default=7, help="rounds that count")
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--prompts", type=positive, default=16, help="of all ranks together")
    parser.add_argument("--tokens", type=positive, default=128, help="of each prompt")
    parser.add_argument("--new-tokens", type=positive, default=32, help="after each prompt")
    parser.add_argument("--layers", type=positive, default=Sizes().layers, help="of the model that is made")
    parser.add_argument("--model", type=path_of, help="a checkpoint in BF16 instead of the one that is made")
    parser.add_argument("--only", action="append", choices=list(LINKS), help="this link; may be given again")
    parser.add_argument("--contenders", help="parts of names, separated by semicolons")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--write", type=new_file, help="writes the tables as a Markdown page")
    return parser


if __name__ == "__main__":
    run(main)
