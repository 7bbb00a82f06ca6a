"""One family on two ranks through the plug-in, held against one plain process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

import megamoe.model  # noqa: F401  transformers knows the layer from here on
from benchmarks.transformers_families.tiny import VOCABULARY, Family, experts_of, write_tiny
from megamoe.launch.ranks import LocalRanks
from megamoe.model import RoutedExperts
from megamoe.parallel.group import EPGroup
from megamoe.reference import relative_error

BOUND = 1e-2  # of BF16 experts, relative
# how transformers lays out dense weights, and their dtype: not every family runs in each, whatever computes its experts
LAYOUTS = (("fsdp", torch.bfloat16), ("tp", torch.bfloat16), ("fsdp", torch.float32))

Calls = dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]


@dataclass(frozen=True)
class Row:
    """What came of a family.

    refusal       why the plug-in does not take it; empty where it does
    failure       why it ran in no layout
    layout        the first that it ran in
    experts       the largest relative error of an experts module that is fed with what the plain one was fed
    output        relative error of the model's output against the plain model in FP32
    theirs        the same with transformers' own exchange of tokens in place of the layer
    plain         the same of the plain model in the layout's dtype
    """

    family: str
    model: str
    num_modules: int = 0
    activation: str = ""
    layout: str = ""
    refusal: str = ""
    failure: str = ""
    experts: float = float("nan")
    output: float = float("nan")
    theirs: float = float("nan")
    plain: float = float("nan")

    @property
    def works(self) -> bool:
        return self.experts < BOUND

    @property
    def wrong(self) -> bool:
        """Computed, and not what the plain model computes."""
        return not self.refusal and not self.failure and not self.works


@dataclass(frozen=True)
class Answer:
    """A rank's: results of experts modules [T, H] by name, the model's output, what the layers compute."""

    experts: dict[str, Tensor]
    output: Tensor
    activation: str
    num_layers: int


def compare(family: Family, ranks: LocalRanks, *, theirs: bool = True) -> Row:
    """Runs a tiny random model of the family on two of the ranks, with theirs also as transformers does."""
    token_ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    row, failures = Row(family.name, family.model.__name__), []
    with TemporaryDirectory() as folder:
        path = Path(folder)
        write_tiny(family, path)
        exact = _forward(family.model.from_pretrained(path, dtype=torch.float32), token_ids)
        for layout, dtype in LAYOUTS:
            plain, calls = record(family.model.from_pretrained(path, dtype=dtype), token_ids)
            row = replace(row, num_modules=len(calls), layout=f"{layout}, {str(dtype).removeprefix('torch.')}")
            work = (answer, family.model, path, token_ids, calls, layout, dtype)
            try:
                answers = ranks.run(*work, "megamoe", size=2)
            except Exception as failure:  # noqa: BLE001  the page says what it was
                if "does not fit the layer" in str(failure):
                    return replace(row, refusal=_first_line(failure))
                failures.append(f"{row.layout}: {_first_line(failure)}")
                continue
            assert all(each.num_layers == len(calls) for each in answers), "not every experts module has its layer"
            row = replace(
                row,
                activation=answers[0].activation,
                experts=max(relative_error(each.experts[name], calls[name][2]) for each in answers for name in calls),
                output=max(relative_error(each.output, exact) for each in answers),
                plain=relative_error(plain, exact),
            )
            if theirs:
                outputs = [each.output for each in ranks.run(*work, "all_to_all", size=2)]
                row = replace(row, theirs=max(relative_error(output, exact) for output in outputs))
            return row
    return replace(row, failure="; ".join(failures))


def _first_line(failure: Exception) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[0] if lines else type(failure).__name__


def answer(
    group: EPGroup,
    model: type[PreTrainedModel],
    path: Path,
    token_ids: Tensor,
    calls: Calls,
    layout: str,
    dtype: torch.dtype,
    implementation: str,
) -> Answer:
    """The model on this rank of several: its output, and what its experts give for what the plain ones were given."""
    config = DistributedConfig(
        **{f"{layout}_size": group.size, "ep_size": group.size}, ep_implementation=implementation
    )
    loaded = model.from_pretrained(path, dtype=dtype, distributed_config=config)
    output = _forward(loaded, token_ids)
    with torch.no_grad():
        modules = {name: module for name, module in experts_of(loaded).items() if name in calls}
        found = {name: module(*calls[name][0], **calls[name][1]) for name, module in modules.items()}
    routed = [module for module in loaded.modules() if isinstance(module, RoutedExperts)]
    return Answer(found, output, str(routed[0].structure.activation) if routed else "", len(routed))


def record(model: PreTrainedModel, token_ids: Tensor) -> tuple[Tensor, Calls]:
    """The model's output, and what each experts module was given and gave."""
    calls: Calls = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            calls[name] = args, kwargs, output

        return hook

    handles = [each.register_forward_hook(note(name), with_kwargs=True) for name, each in experts_of(model).items()]
    output = _forward(model, token_ids)
    for handle in handles:
        handle.remove()
    return output, calls


def _forward(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=token_ids, use_cache=False)
    output = found.logits if "logits" in found else found[0]
    whole: Tensor = output.full_tensor() if hasattr(output, "full_tensor") else output
    return whole
