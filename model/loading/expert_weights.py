"""Routed experts of one block: what the checkpoint makes them from, and each read alone, by byte range."""

# E experts   N outputs   K inputs   H hidden   I intermediate

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megamoe.formats import BLOCK, MXFP4
from megamoe.formats.weight import Weight
from megamoe.model.experts import RoutedExperts
from megamoe.model.loading.files import FLOATS, Entry, TensorFiles
from megamoe.model.loading.naming import Target
from megamoe.model.loading.quantization import RoundingError, quantize
from megamoe.model.loading.skeleton import Block
from megamoe.model.loading.stored import Encoding, Stored
from megamoe.model.structure import Structure

_NUMBER = re.compile(r"\bexperts\.(\d+)\.")  # of an expert, in the name of a tensor of its own


@dataclass(frozen=True, slots=True)
class Shapes:
    """What a converter asks of a model, for one parameter."""

    name: str
    shape: tuple[int, ...]

    def get_parameter(self, name: str) -> Tensor:
        assert name == self.name, (name, self.name)
        return torch.empty(self.shape, device="meta")


class Buffers:
    """Memory that is read into again and again: fresh pages cost as much as reading into them.

    Whoever has what was read must be done with it when the same buffers are read into again.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._parts: dict[str, Buffers] = {}

    def part(self, name: str) -> Buffers:
        return self._parts.setdefault(name, Buffers())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        held = self._held.get(name)
        if held is None or held.shape != shape or held.dtype != dtype:
            held = self._held[name] = torch.empty(shape, dtype=dtype, device="cpu")
        return held


def parameter_names(structure: Structure) -> tuple[str, ...]:
    """Of the experts module: Linear-1's weight, Linear-2's, and their biases."""
    biases = (f"{structure.first}_bias", "down_proj_bias") if structure.has_bias else ()
    return (structure.first, "down_proj", *biases)


def names_of_experts(blocks: Iterable[Block]) -> set[str]:
    """Of all parameters of these blocks, in the model's state dict."""
    return {f"{each.name}.{name}" for each in blocks for name in parameter_names(each.structure)}


@dataclass(slots=True)
class ExpertParameter:
    """One of the module's stacked parameters, and where its experts lie.

    name    in the model's state dict
    shape   of the module's parameter, [E, ...]
    """

    name: str
    target: Target
    shape: tuple[int, ...]
    model: Any
    config: Any
    _whole: Tensor | None = None  # where the converter moves something along the experts

    @property
    def encoding(self) -> Encoding:
        """MXFP4 where all sources are; else plain, as what is read is a float tensor."""
        kinds = {each.encoding for each in self.target.stored}
        return Encoding.mxfp4 if kinds == {Encoding.mxfp4} else Encoding.plain

    def check(self, structure: Structure) -> None:
        """ValueError for sources that are not of E experts, of another shape than the module's, or of integers."""
        experts = self.shape[0]
        for sources in self.target.ordered():
            self._check_number(sources, experts)
            for each in sources:
                if each.encoding is Encoding.plain and each.values.dtype not in FLOATS:
                    raise ValueError(
                        f"{each.values.file}: {each.name} has dtype {each.values.dtype}, expected one of "
                        f"{', '.join(FLOATS)}, or packed values with scales beside them"
                    )
        if self.target.rows_stacked:
            self._check_rows(structure)
        elif any(each.encoding is Encoding.mxfp4 for each in self.target.stored):
            raise ValueError(
                f"{self.target.name} is in MXFP4, and transformers rearranges what it is made from, which is not "
                "supported for packed values"
            )

    def _check_number(self, sources: list[Stored], experts: int) -> None:
        if self._is_stack(sources):
            return
        if len(sources) != experts:
            raise ValueError(
                f"{self.target.name} has {experts} experts, and the checkpoint has {len(sources)} tensors like "
                f"{sources[0].name} {list(sources[0].shape)}"
            )
        for expert, source in enumerate(sources):
            number = _NUMBER.search(source.name)
            if number is not None and int(number[1]) != expert:
                raise ValueError(
                    f"{self.target.name} has experts 0 to {experts - 1}, and where expert {expert} should be the "
                    f"checkpoint has {source.name}"
                )

    def _is_stack(self, sources: list[Stored]) -> bool:
        """Whether one tensor holds all experts."""
        return len(sources) == 1 and len(sources[0].shape) == len(self.shape) and sources[0].shape[0] == self.shape[0]

    def _check_rows(self, structure: Structure) -> None:
        """The matrices of all sources, one below the other, have the parameter's shape."""
        expected = list(self.shape[1:])
        if self.encoding is Encoding.mxfp4 and structure.is_transposed:
            expected.reverse()  # packed along inputs, so outputs come first
        for expert in range(self.shape[0]):
            parts = self._sources(expert)
            shapes = [list(source.shape if own else source.shape[1:]) for source, own in parts]
            if any(shape[1:] != expected[1:] for shape in shapes) or sum(shape[0] for shape in shapes) != expected[0]:
                named = ", ".join(f"{source.name} {shape}" for (source, _), shape in zip(parts, shapes, strict=True))
                raise ValueError(f"{self.target.name} needs {expected} of expert {expert}, the checkpoint has {named}")
            if self._is_stack(self.target.ordered()[0]):
                return

    def _sources(self, expert: int) -> list[tuple[Stored, bool]]:
        """Where an expert's parts lie, in order, and whether they are tensors of its own."""
        return [
            (sources[0], False) if self._is_stack(sources) else (sources[expert], True)
            for sources in self.target.ordered()
        ]

    def size_of_one(self) -> int:
        """Bytes in the files, of one expert."""
        return sum(source.size // (1 if own else self.shape[0]) for source, own in self._sources(0))

    def read(self, files: TensorFiles, expert: int, buffers: Buffers) -> Weight:
        """An expert's matrix or bias in the module's orientation, perhaps in buffers; MXFP4 outputs first."""
        if not self.target.by_expert:
            return self._of_whole(files, expert)
        parts = self._sources(expert)
        if self.target.rows_stacked:
            if len({(source.encoding, source.values.dtype) for source, _ in parts}) == 1:
                if parts[0][0].encoding is Encoding.plain:
                    return _stack_rows(files, parts, expert, buffers)
                if parts[0][0].encoding is Encoding.mxfp4:
                    packed, scales = (
                        _stack_bytes(files, parts, expert, buffers, each) for each in ("values", "scales")
                    )
                    return MXFP4(packed, scales)
            return torch.cat([source.read_dense(files, None if own else expert) for source, own in parts])
        tensors = {}
        for pattern, sources in self.target.sources.items():
            if self._is_stack(sources):
                tensors[pattern] = [sources[0].read_dense(files, expert).unsqueeze(0)]
            else:
                tensors[pattern] = [sources[expert].read_dense(files)]
        return self.target.convert_expert(tensors, Shapes(self.target.name, (1, *self.shape[1:])), self.config)

    def _of_whole(self, files: TensorFiles, expert: int) -> Tensor:
        if self._whole is None:
            tensors = {
                pattern: [each.read_dense(files) for each in sources]
                for pattern, sources in self.target.sources.items()
            }
            made = self.target.convert(tensors, self.model, self.config)
            self._whole = made[self.name]
        return self._whole[expert]

    def forget(self) -> None:
        """Lets go of what read() keeps."""
        self._whole = None


def _stack_rows(files: TensorFiles, parts: list[tuple[Stored, bool]], expert: int, buffers: Buffers) -> Tensor:
    """Plain matrices of one dtype read one below the other, into one."""
    shapes = [source.shape if own else source.shape[1:] for source, own in parts]
    out = buffers.take("plain", (sum(each[0] for each in shapes), *shapes[0][1:]), parts[0][0].values.torch_dtype)
    begin = 0
    for (source, own), shape in zip(parts, shapes, strict=True):
        _read_one(files, source.values, own, expert, out[begin : begin + shape[0]])
        begin += shape[0]
    return out


def _stack_bytes(
    files: TensorFiles, parts: list[tuple[Stored, bool]], expert: int, buffers: Buffers, which: str
) -> Tensor:
    """Values or scales of MXFP4 matrices read one below the other -> uint8 [N, K/2] or [N, K/32]"""
    shapes = [source.shape if own else source.shape[1:] for source, own in parts]
    columns = shapes[0][1] // (2 if which == "values" else BLOCK)
    out = buffers.take(which, (sum(each[0] for each in shapes), columns), torch.uint8)
    begin = 0
    for (source, own), shape in zip(parts, shapes, strict=True):
        entry = source.values if which == "values" else source.scales
        assert entry is not None
        _read_one(files, entry, own, expert, out[begin : begin + shape[0]])
        begin += shape[0]
    return out


def _read_one(files: TensorFiles, entry: Entry, own: bool, expert: int, out: Tensor) -> None:
    """A tensor that is an expert's own, or the expert's part of a stack."""
    if own:
        files.read(entry, out)
    else:
        files.read(entry, out, first=expert, count=1)


@dataclass(slots=True)
class ExpertSource:
    """One block's experts: their parameters in the order of parameter_names(), and what loading them rounded."""

    name: str
    structure: Structure
    parameters: dict[str, ExpertParameter]
    error: RoundingError = field(default_factory=RoundingError)

    def check(self, weight_format: str) -> None:
        """ValueError for weights that are not there, do not fit, or that the format has no place for."""
        for parameter in self.parameters.values():
            parameter.check(self.structure)
        if weight_format == "mxfp4":
            for what, size in (("hidden", self.structure.hidden), ("intermediate", self.structure.intermediate)):
                if size % BLOCK:
                    raise ValueError(
                        f"{self.name}: {what} {size} is no multiple of {BLOCK}, which mxfp4 needs and bf16 does not"
                    )

    def format(self, experts: str) -> str:
        """The layer's weight format where `experts` is asked for."""
        if experts != "checkpoint":
            return experts
        packed = {self.parameters[name].encoding is Encoding.mxfp4 for name in parameter_names(self.structure)[:2]}
        return "mxfp4" if packed == {True} else "bf16"

    @property
    def size_of_one(self) -> int:
        return sum(parameter.size_of_one() for parameter in self.parameters.values())

    def read(self, files: TensorFiles, expert: int, buffers: Buffers) -> list[Weight]:
        """What RoutedExperts.load() takes of an expert, as it is stored; perhaps in buffers."""
        return [
            self.parameters[name].read(files, expert, buffers.part(name)) for name in parameter_names(self.structure)
        ]

    def put(self, routed: RoutedExperts, expert: int, weights: list[Weight], scales: str) -> None:
        """Takes what read() gave to its place, rounded where the layer's format is another. It is called in a turn."""
        first, down, *biases = weights
        matrices = [self._rounded(routed.layer.weight_format, each, scales) for each in (first, down)]
        routed.put(expert, *matrices, *(each.to(torch.float32) for each in biases))  # type: ignore[arg-type, union-attr]

    def _rounded(self, weight_format: str, weight: Weight, scales: str) -> Weight:
        if isinstance(weight, MXFP4):
            return weight
        if weight_format == "mxfp4":
            return quantize(weight.mT.contiguous() if self.structure.is_transposed else weight, scales, self.error)
        if weight.dtype != torch.bfloat16:
            rounded = weight.to(torch.bfloat16)
            self.error.add(weight, rounded)
            return rounded
        return weight

    def forget(self) -> None:
        for parameter in self.parameters.values():
            parameter.forget()

    def let_go(self) -> None:
        """Of the model, which converters ask for shapes: from now on they are told from what is known of them."""
        for parameter in self.parameters.values():
            parameter.model = Shapes(parameter.name, parameter.shape)


def expert_source(
    name: str, structure: Structure, targets: Mapping[str, Target], own: Mapping[str, Tensor], model: Any
) -> ExpertSource:
    """The experts of the module `name`. ValueError where the checkpoint has nothing for one of its parameters."""
    parameters = {}
    for each in parameter_names(structure):
        full = f"{name}.{each}"
        if full not in targets:
            raise ValueError(f"the checkpoint has nothing for {full}")
        shape = tuple(own[full].shape)
        parameters[each] = ExpertParameter(full, targets[full], shape, model, model.config)
    return ExpertSource(name, structure, parameters)
