"""python -m examples.train_tiny.figure OUT/log.jsonl loss.svg: the curves of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#5c5c5c"
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "megamoe", "font.size": 10.5, "axes.axisbelow": True}


def draw(log: list[dict[str, float]], path: Path) -> None:
    """Left the loss, trained on and held out; right the busiest expert's load. On white, for light pages and dark."""
    steps = [each["step"] for each in log]
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(9, 3.8), dpi=160)
        losses, loads = figure.subplots(1, 2, width_ratios=(3, 2))
        losses.plot(steps, [each["loss"] for each in log], color=_BLUE, lw=1.4, label="the step's batch")
        losses.plot(steps, [each["test_loss"] for each in log], color=_ORANGE, lw=1.4, label="held out")
        losses.set_ylabel("loss, nats a token")
        losses.legend(edgecolor="none")
        loads.plot(steps, [each["busiest"] for each in log], color=_GREEN, lw=1.4)
        loads.axhline(1, color=_GREY, lw=0.8, ls="--")
        loads.set_ylabel("busiest expert, times the mean")
        loads.set_ylim(0)
        for axes in (losses, loads):
            axes.set_xlabel("step")
            axes.grid(color="#e5e5e5", lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m examples.train_tiny.figure LOG.jsonl FIGURE.svg")
    draw([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()], Path(sys.argv[2]))


if __name__ == "__main__":
    main()
