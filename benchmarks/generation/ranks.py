"""What the ranks of a contender do: the model is loaded once and kept, and generates when it is asked."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from torch.distributed import Store

from benchmarks.generation.contenders import DEADLINE_S, Contender, Passage, Prompts, Writer
from benchmarks.loading import resident
from megamoe.launch.lab.namespaces import Host
from megamoe.launch.ranks import LocalRanks

Place = Any  # rank, number of ranks, store: a contender makes a group of its own, and LocalRanks none
_kept: list[tuple[ExitStack, Writer, float]] = []  # of this rank: its group, its model, MB of the process without them


def ranks_of(hosts: Sequence[Host]) -> LocalRanks:
    """A rank of one thread on each of these hosts, for one contender."""
    return LocalRanks(len(hosts), threads_per_rank=1, deadline_s=DEADLINE_S, hosts=hosts, group=_place)


def load_model(place: Place, contender: Contender, path: Path) -> None:
    """The contender's model, kept with its group until the rank ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401  before memory is looked at

    import megamoe.model.generation.engine
    import megamoe.model.loading.load  # noqa: F401

    before, (rank, size, store) = resident("VmRSS") / 1e6, place
    with ExitStack() as stack:
        writer = stack.enter_context(contender.on_rank(rank, size, store, path))
        _kept.append((stack.pop_all(), writer, before))


def write(_: Place, prompts: Prompts, new_tokens: int) -> tuple[Passage, float]:
    """A generation, and by how many MB the rank has grown with the model and what it has generated."""
    stack, writer, before = _kept[0]
    try:
        passage = writer.write(prompts, new_tokens)
    except BaseException:
        stack.close()  # the others wait for this rank no longer
        raise
    gc.collect()
    return passage, resident("VmRSS") / 1e6 - before


def _place(rank: int, size: int, store: Store) -> AbstractContextManager[Place]:
    return nullcontext((rank, size, store))
