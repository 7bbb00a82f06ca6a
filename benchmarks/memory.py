"""What a rank holds after loading: its experts' packed bytes, and the process itself. Prints one line a rank.

python -m benchmarks.memory --ranks 2 --experts 64
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.command import positive, run
from megamoe.launch.ranks import LocalRanks
from megamoe.model.deepseek_v4.blocks import ExpertStack
from megamoe.model.deepseek_v4.checkpoint import Checkpoint
from megamoe.model.deepseek_v4.synthetic import SMALL, write_checkpoint
from megamoe.parallel.group import EPGroup

ALLOWED_MB = 300


def load(group: EPGroup, path: Path) -> tuple[float, float, float]:
    """Megabytes: resident before loading, resident after, packed bytes of the experts."""
    before = psutil.Process().memory_info().rss
    with Checkpoint.open(path) as checkpoint:
        model = ExpertStack.load(checkpoint, group)
    after = psutil.Process().memory_info().rss
    return before / 1e6, after / 1e6, model.expert_bytes / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a rank holds more than its experts and 300 MB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--experts", type=positive, default=64)
    parser.add_argument("--hidden", type=positive, default=1024)
    parser.add_argument("--intermediate", type=positive, default=2048)
    asked = parser.parse_args(arguments)
    config = SMALL.model_copy(
        update={
            "n_routed_experts": asked.experts,
            "num_experts_per_tok": min(asked.experts, SMALL.num_experts_per_tok),
            "hidden_size": asked.hidden,
            "moe_intermediate_size": asked.intermediate,
            "vocab_size": 1000,
        }
    )
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder, LocalRanks(asked.ranks) as ranks:
        path = Path(folder) / "checkpoint"
        write_checkpoint(path, config)
        print(f"{'rank':>4} {'before MB':>10} {'after MB':>10} {'experts MB':>11} {'above MB':>9}")
        for rank, (before, after, packed) in enumerate(ranks.run(load, path, timeout_s=300)):
            worst = max(worst, after - packed)
            print(f"{rank:>4} {before:>10.1f} {after:>10.1f} {packed:>11.1f} {after - packed:>9.1f}")
    print(f"largest above its experts: {worst:.1f} MB, allowed {ALLOWED_MB} MB")
    return int(worst > ALLOWED_MB)


if __name__ == "__main__":
    run(main)
