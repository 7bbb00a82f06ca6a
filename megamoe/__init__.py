"""megamoe: a Mixture-of-Experts layer whose communication hides under its compute.

    hidden [T, H] -- router --> topk_ids [T, K] int64 (-1 masks), topk_weights [T, K] float32
      | quantise: E4M3 + one UE8M0 scale per 32
      v
    dispatch of wave w:  rows of every rank for this rank's experts of wave w
      v
    experts of wave w:   Linear-1 (FP8 x FP4) -> clamp, SiLU(gate)*up*weight -> FP8 -> Linear-2 -> BF16
      v
    combine of wave w:   rows go home to slot [token, k]
      v
    sum of the slots in ascending order in FP32 -> hidden [T, H] BF16

In steady state dispatch(w+1), experts(w) and combine(w-1) run at the same time.

Rooms, imports pointing down only:

    launch     starts ranks and says what they do: command line, clusters that come back, torchrun, Ray, the lab
    model      models that use the layer: routers, checkpoints, blocks
    megamoe    the layer: number formats, experts, waves; the planner and its catalog, without torch
    parallel   where ranks are and how bytes move: process groups, placement, exchange

Everything here is imported when it is first used, so that commands which need no torch never pay for it.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamoe.activations import Activation
    from megamoe.execution.journeys import CallRecord
    from megamoe.formats import MXFP4, MXFP8
    from megamoe.launch.cluster.cluster import MegaMoECluster
    from megamoe.launch.cluster.recovery import RestartPolicy
    from megamoe.layer import MegaMoE
    from megamoe.parallel.errors import PeerError
    from megamoe.parallel.group import EPGroup, init_group
    from megamoe.shape import MoEShape
    from megamoe.trace.recording import record
    from megamoe.trace.timeline import Timeline
    from megamoe.training import TrainableMoE

if not os.path.isdir(os.path.join(__path__[0], "parallel")):
    raise ImportError(
        f"{__path__[0]} has no folders parallel, model and launch: they are symbolic links, which git leaves out on "
        "Windows unless it may make them. Turn Developer Mode on, then: git config core.symlinks true; "
        "git checkout -- megamoe"
    )

__version__ = "0.1.0"

_EXPORTS = {
    "Activation": "megamoe.activations",
    "CallRecord": "megamoe.execution.journeys",
    "EPGroup": "megamoe.parallel.group",
    "MXFP4": "megamoe.formats",
    "MXFP8": "megamoe.formats",
    "MegaMoE": "megamoe.layer",
    "MegaMoECluster": "megamoe.launch.cluster.cluster",
    "MoEShape": "megamoe.shape",
    "PeerError": "megamoe.parallel.errors",
    "RestartPolicy": "megamoe.launch.cluster.recovery",
    "Timeline": "megamoe.trace.timeline",
    "TrainableMoE": "megamoe.training",
    "init_group": "megamoe.parallel.group",
    "record": "megamoe.trace.recording",
}

__all__ = [
    "MXFP4",
    "MXFP8",
    "Activation",
    "CallRecord",
    "EPGroup",
    "MegaMoE",
    "MegaMoECluster",
    "MoEShape",
    "PeerError",
    "RestartPolicy",
    "Timeline",
    "TrainableMoE",
    "__version__",
    "init_group",
    "record",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'megamoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
