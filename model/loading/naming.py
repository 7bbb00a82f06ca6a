"""From a checkpoint's names to a transformers model's, by transformers' own conversion mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from megamoe.model.loading.files import FLOATS
from megamoe.model.loading.stored import Encoding, Stored
from megamoe.model.private import may_be_missing


@dataclass(slots=True)
class Target:
    """A tensor of the model and what the checkpoint makes it from.

    name        in the model's state dict; of a converter with several targets the first
    sources     by pattern of the converter, in the order of numbers in their names; without a converter one of one
    converter   transformers' operations; None where the tensor has only another name
    """

    name: str
    sources: dict[str, list[Stored]] = field(default_factory=dict)
    converter: WeightConverter | None = None

    @property
    def stored(self) -> list[Stored]:
        return [each for sources in self.sources.values() for each in sources]

    @property
    def rows_stacked(self) -> bool:
        """Whether an expert's matrix is its sources' one below the other, nothing else done to them."""
        operations = [] if self.converter is None else self.converter.operations
        return all(
            (isinstance(each, MergeModulelist) and each.dim == 0)
            or (isinstance(each, Concatenate) and each.dim == 1 and each.num_shards_attribute is None)
            for each in operations
        )

    @property
    def by_expert(self) -> bool:
        """Whether the operations do the same to each expert alone: none moves anything along the experts."""
        operations = [] if self.converter is None else self.converter.operations
        return all(_keeps_experts(each) for each in operations)

    def ordered(self) -> list[list[Stored]]:
        """Sources of each pattern, in the order in which the converter takes the patterns."""
        if self.converter is None:
            return list(self.sources.values())
        return [self.sources[pattern] for pattern in self.converter.source_patterns if pattern in self.sources]

    def convert(self, tensors: Mapping[str, list[Tensor]], model: Any, config: Any) -> dict[str, Tensor]:
        """The converter's operations on tensors by pattern -> the model's tensors by name."""
        if self.converter is None:
            (sources,) = tensors.values()
            return {self.name: sources[0]}
        converter = deepcopy(self.converter)
        for pattern, sources in tensors.items():
            converter.collected_tensors[pattern] = [(lambda tensor=each: tensor) for each in sources]
        made = converter.convert(self.name, model=model, config=config)
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

    def convert_expert(self, tensors: Mapping[str, list[Tensor]], model: Any, config: Any) -> Tensor:
        """As convert(), for one expert: matrices where the converter merges a list, else stacks of one."""
        (made,) = self.convert(tensors, model, config).values()
        return made[0]


def _keeps_experts(operation: Any) -> bool:
    if isinstance(operation, MergeModulelist):
        return bool(operation.dim == 0)
    if isinstance(operation, Transpose):
        return operation.dim0 in (1, 2, -1, -2) and operation.dim1 in (1, 2, -1, -2)
    return isinstance(operation, Concatenate | Interleave | Chunk) and operation.dim in (1, 2, -1, -2)


@dataclass(frozen=True, slots=True)
class Naming:
    """Targets by name of the model's tensors, and names of the checkpoint that the model has no place for."""

    targets: dict[str, Target]
    unused: tuple[str, ...]


def name_tensors(model: Any, own: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> Naming:
    """Which of the checkpoint's tensors each of the model's is made from.

    model: on meta, as its class makes it; own: its state dict.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    targets: dict[str, Target] = {}
    unused = []
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed, pattern = rename_source_key(name, [], [], prefix, own)
        if renamed not in own:
            unused.append(name)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        target = targets.setdefault(renamed, Target(renamed, converter=converter))
        target.sources.setdefault(pattern or name, []).append(stored[name])
    return Naming(targets, tuple(unused))


def made_by(target: Target, own: Mapping[str, Tensor]) -> list[str]:
    """Names of the model's tensors, of its state dict, that a target stands for: the converter's, or its own."""
    if target.converter is None or len(target.converter.target_patterns) == 1:
        return [target.name]
    first, *others = target.converter.target_patterns
    names = [target.name, *(target.name.replace(_literal(first), _literal(other)) for other in others)]
    return [name for name in names if name in own]


def dense_targets(naming: Naming, model: Any, own: Mapping[str, Tensor], of_experts: set[str]) -> list[Target]:
    """What is not made for routed experts, whose tensors in the model are of_experts.

    ValueError for tensors of the model that nothing in the checkpoint is for, and for one that is taken as it is and
    has another shape or dtype than the model's.
    """
    made = {id(target): set(made_by(target, own)) for target in naming.targets.values()}
    _refuse_missing(model, own, {name for names in made.values() for name in names})
    dense = [target for target in naming.targets.values() if not of_experts & made[id(target)]]
    for target in dense:
        _check_dense(target, own)
    return dense


def _refuse_missing(model: Any, own: Mapping[str, Tensor], made: set[str]) -> None:
    tied = getattr(model, "all_tied_weights_keys", {})
    ignored = [re.compile(each) for each in may_be_missing(model)]
    missing = [
        name
        for name in own
        if name not in made
        and not (name in tied and tied[name] in made)
        and not any(each.search(name) for each in ignored)
    ]
    if missing:
        raise ValueError(
            f"the checkpoint has nothing for {missing[0]}"
            + (f" and {len(missing) - 1} other tensors of the model" if len(missing) > 1 else "")
        )


def _check_dense(target: Target, own: Mapping[str, Tensor]) -> None:
    if target.converter is not None:
        return
    if len(target.stored) > 1:
        names = " and ".join(each.name for each in target.stored)
        raise ValueError(f"{names} are both {target.name}")
    (stored,) = target.stored
    expected = own[target.name]
    if stored.shape != tuple(expected.shape):
        raise ValueError(
            f"{stored.values.file}: {stored.name} is {list(stored.shape)}, the config asks for {list(expected.shape)}"
        )
    if expected.is_floating_point() and stored.encoding is Encoding.plain and stored.values.dtype not in FLOATS:
        raise ValueError(
            f"{stored.values.file}: {stored.name} has dtype {stored.values.dtype}, expected one of {', '.join(FLOATS)}"
        )
    if not expected.is_floating_point() and stored.values.dtype in FLOATS:
        raise ValueError(f"{stored.values.file}: {stored.name} has dtype {stored.values.dtype}, expected integers")


def _literal(pattern: str) -> str:
    return re.sub(r"\\(.)", r"\1", pattern)
