"""Who generates: this package, and transformers' own expert parallelism in the configurations that work."""

# N ranks   T tokens of a prompt

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store

Prompts = Sequence[Sequence[int]]
DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True)
class Passage:
    """What one rank saw of a generation. Seconds are from a barrier on.

    prefill_s   until the first new token of every prompt of this rank
    whole_s     until the last one
    texts       new tokens by the prompt's place
    """

    prefill_s: float
    whole_s: float
    texts: dict[int, list[int]]


class Writer(ABC):
    """A contender's model on one rank of a group."""

    @abstractmethod
    def write(self, prompts: Prompts, new_tokens: int) -> Passage:
        """The most likely new_tokens after each prompt; all ranks are called with the same."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A row of the table. options: of the library's own way to load."""

    name: str
    ours: bool
    options: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def on_rank(self, rank: int, size: int, store: Store, path: Path) -> Iterator[Writer]:
        """The model, in a group of ranks as its library's users start one."""
        with _our_group(rank, size, store) if self.ours else _plain_group(rank, size, store) as group:
            yield OurWriter(path, group, self.options) if self.ours else TransformersWriter(path, size, self.options)


def _transformers(name: str, experts: str, **sizes: Any) -> Contender:
    return Contender(f"transformers {name}, {experts}", ours=False, options={"experts": experts, "sizes": sizes})


_N = "N"  # stands for the number of ranks
CONTENDERS = (
    _transformers("tp + ep, all_reduce", "grouped_mm", tp_size=_N, ep_size=_N, ep_implementation="all_reduce"),
    _transformers("tp + ep, all_reduce", "eager", tp_size=_N, ep_size=_N, ep_implementation="all_reduce"),
    _transformers("tp + ep, all_to_all", "grouped_mm", tp_size=_N, ep_size=_N, ep_implementation="all_to_all"),
    _transformers("fsdp + ep, all_to_all", "grouped_mm", fsdp_size=_N, ep_size=_N, ep_implementation="all_to_all"),
    Contender("megamoe bf16", ours=True, options={"experts": "bf16"}),
    Contender("megamoe mxfp4", ours=True, options={"experts": "mxfp4"}),
)


def choose(text: str | None) -> list[Contender]:
    """Contenders whose names have one of the parts of a list, separated by semicolons; all for None."""
    if text is None:
        return list(CONTENDERS)
    parts = [part.strip() for part in text.split(";") if part.strip()]
    for part in parts:
        if not any(part in each.name for each in CONTENDERS):
            raise ValueError(
                f"no contender has {part!r} in its name; there are {', '.join(c.name for c in CONTENDERS)}"
            )
    return [each for each in CONTENDERS if any(part in each.name for part in parts)]


def _our_group(rank: int, size: int, store: Store) -> AbstractContextManager[Any]:
    from megamoe.parallel.group import init_group

    return init_group("cpu", rank=rank, size=size, store=store, deadline_s=DEADLINE_S)


@contextmanager
def _plain_group(rank: int, size: int, store: Store) -> Iterator[None]:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=DEADLINE_S))
    try:
        yield
    finally:
        dist.destroy_process_group()


class OurWriter(Writer):
    """megamoe.model.load() and its generation: prompts spread over ranks, in step."""

    def __init__(self, path: Path, group: Any, options: dict[str, Any]) -> None:
        from megamoe.model import load

        self._group = group
        self._model = load(path, group=group, progress=lambda _: None, **options)

    def write(self, prompts: Prompts, new_tokens: int) -> Passage:
        from megamoe.model.generation.engine import Generation
        from megamoe.model.generation.request import GenerationRequest, Prompt

        named = tuple(Prompt(str(number), tuple(prompt)) for number, prompt in enumerate(prompts))
        generation = Generation(self._model, self._group, GenerationRequest(named, new_tokens))
        texts: dict[int, list[int]] = {}
        dist.barrier()
        begun, prefill_s, last = time.perf_counter(), 0.0, 0.0
        mine = len(range(self._group.rank, len(prompts), self._group.size))
        while not generation.done:
            for token in generation.step():
                texts.setdefault(token.prompt, []).append(token.token)
                last = time.perf_counter() - begun
            if not prefill_s and len(texts) == mine:
                prefill_s = time.perf_counter() - begun
        return Passage(prefill_s, last, texts)


class TransformersWriter(Writer):
    """from_pretrained() with a distributed_config, and generate()."""

    def __init__(self, path: Path, size: int, options: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        sizes = {name: size if value == _N else value for name, value in options["sizes"].items()}
        self._own_batch = sizes.get("fsdp_size", 1) > 1
        self._rank, self._size = dist.get_rank(), size
        self._model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16,
            distributed_config=DistributedConfig(**sizes),
            experts_implementation=options["experts"],
        )
        self._model.eval()

    def write(self, prompts: Prompts, new_tokens: int) -> Passage:
        from transformers import StoppingCriteriaList

        mine = list(range(self._rank, len(prompts), self._size)) if self._own_batch else list(range(len(prompts)))
        longest = max(len(prompts[number]) for number in mine)
        ids = torch.zeros(len(mine), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(mine):  # padded before the text, as transformers asks for
            ids[row, longest - len(prompts[number]) :] = torch.tensor(prompts[number])
            mask[row, longest - len(prompts[number]) :] = 1
        times: list[float] = []

        def note(*_: Any, **__: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(mine), dtype=torch.bool)

        dist.barrier()
        begun = time.perf_counter()
        with torch.no_grad():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                stopping_criteria=StoppingCriteriaList([note]),
            )
        texts = {number: out[row, longest:].tolist() for row, number in enumerate(mine)}
        return Passage(times[0] - begun, times[-1] - begun, texts)
