"""What users do on an emulated system without a rank beside theirs, told as JSON: import, ask, compute, train, read.

python tests/other_systems/visit.py FOLDER     with the environment of tests/test_other_systems.py
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megamoe
from megamoe import MegaMoE, MoEShape, TrainableMoE, init_group
from megamoe.kernels.cpu import build
from megamoe.launch.cli.main import COMMANDS
from megamoe.parallel.health import runs
from tests.cases import make_batch, make_weights
from tests.commands import invoked

SHAPE = MoEShape(64, 32, 8, 2, swiglu_limit=3.0)


def digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for each in tensors:
        found.update(each.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def layer_bits() -> str:
    """Of a layer's output on one rank."""
    with init_group("cpu", rank=0, size=1) as group:
        layer = MegaMoE(SHAPE, group)
        layer.load_experts(*make_weights(SHAPE))
        batch = make_batch(SHAPE, 24)
        return digest(layer(batch.hidden, batch.ids, batch.weights))


def training_bits() -> str:
    """Of gradients of a layer that trains in FP4."""
    torch.manual_seed(0)
    layer, batch = TrainableMoE(SHAPE, weight_format="mxfp4"), make_batch(SHAPE, 24)
    layer(batch.hidden, batch.ids, batch.weights).float().square().sum().backward()
    return digest(*(each.grad for each in layer.parameters() if each.grad is not None))


def not_imported() -> dict[str, str]:
    """Modules of the package that cannot be, and why."""
    failed: dict[str, str] = {}
    for module in pkgutil.walk_packages(megamoe.__path__, "megamoe.", onerror=lambda name: failed.update({name: ""})):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except Exception as failure:  # noqa: BLE001  what kind it is the test shows
                failed[module.name] = repr(failure)
    return failed


def checkpoints(folder: Path) -> dict[str, Any]:
    """A checkpoint made, converted, and read whole into a model that says something."""
    made = invoked("tiny", folder / "tiny", "--like", "mixtral", "--num-experts", "4", "--format", "json")
    turned = invoked("convert", folder / "tiny", folder / "fp4", "--experts", "mxfp4", "--format", "json")
    model: Any = importlib.import_module("megamoe.model").load(folder / "fp4")
    tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    return {"exit codes": [made.exit_code, turned.exit_code], "tokens": tokens.shape[1], "said": turned.output[-300:]}


def starting_ranks(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Exit codes of the verbs that start ranks, and what they say."""
    requests = ("bench", "demo", "launch --ranks 2", f"generate --ranks 1 --text a --model {checkpoint}")
    found = {}
    for request in requests:
        done = invoked(*request.split(), COLUMNS="200")
        found[request.split()[0]] = (done.exit_code, " ".join(done.stderr.split()))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found: dict[str, Any] = {"layer": layer_bits(), "training": training_bits()}
    found["warnings"] = [str(each.message) for each in warned if "experts are computed" in str(each.message)]
    found["options"] = [*build.FLAGS, *build.LINK]
    found["not imported"] = not_imported()
    found["verbs without help"] = [verb for verb in COMMANDS if invoked(verb, "--help").exit_code]
    found["checkpoints"] = checkpoints(folder)
    found["ranks"] = starting_ranks(folder / "fp4") if os.environ["MEGAMOE_SYSTEM"] == "win32" else {}
    with runs.list_rank("here", 0, "127.0.0.1", 1, "token"):
        found["runs"] = {name: [rank.rank for rank in ranks] for name, ranks in runs.listed().items()}
    found["doctor"] = json.loads(invoked("doctor", "--no-exchange", "--format", "json").stdout)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
