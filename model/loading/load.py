"""megamoe.model.load(): a checkpoint as a transformers model on a group of ranks."""

# T tokens   E experts   H hidden   N outputs   K inputs

from __future__ import annotations

import gc
import re
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from megamoe.execution.checks import check_device
from megamoe.formats import WEIGHT_FORMATS
from megamoe.formats.weight import Weight
from megamoe.kernels.cpu.layout import OUTPUTS
from megamoe.kernels.cpu.library import KernelWarning
from megamoe.model.dense import DenseLinear, DenseWeight, FP8Linear, compute_in_fixed_order
from megamoe.model.experts import RoutedExperts
from megamoe.model.loading.expert_weights import Buffers, ExpertSource, expert_source, names_of_experts
from megamoe.model.loading.files import FLOATS, TensorFiles
from megamoe.model.loading.naming import Target, dense_targets, made_by, name_tensors
from megamoe.model.loading.quantization import RoundingError, check_scales
from megamoe.model.loading.report import LoadReport, Progress, shown
from megamoe.model.loading.skeleton import (
    Block,
    Skeleton,
    build,
    fp8_block,
    naming_format,
    read_config,
    set_module,
    set_tensor,
)
from megamoe.model.loading.stored import Encoding, Stored, check_values, scales_to_float, stored_tensors
from megamoe.model.loading.together import Checked, agree_on, run_together
from megamoe.model.private import may_be_unused
from megamoe.parallel.group import EPGroup
from megamoe.paths import AnyPath, lasting_path_of

EXPERTS = ("checkpoint", *WEIGHT_FORMATS)
DENSE = ("checkpoint", "bf16")
_AHEAD = 2  # experts that are read while one is packed
_CHUNK_BYTES = 32 << 20  # of a dense weight that is packed at a time
_WHAT = "loading"
_TABLE = "tid2eid"  # in which a hash-routed layer looks up a token's experts


def load(
    path: AnyPath,
    *,
    group: EPGroup | dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    experts: str = "checkpoint",
    dense: str = "checkpoint",
    scales: str = "contract",
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Any:
    """A checkpoint of transformers, or DeepSeek-V4's own, as a transformers model with its experts over a group.

    path      a folder: config.json, safetensors and their index; nothing else is opened
    group     torch ProcessGroup or EPGroup; None is one rank. All ranks must call. Dense weights are on every rank, so
              each runs a batch of its own; experts lie as Placement says, evenly or not
    experts   "checkpoint": MXFP4 stays MXFP4, and all else is BF16; or "mxfp4" or "bf16" for all of them
    dense     "checkpoint": what is stored in FP8 stays FP8; "bf16" decodes it while loading
    scales    how MXFP4 is rounded to: "contract", or "best" of two scales for each block
    progress  called with every Progress, about ten times a second; by default rank 0 draws a bar where stderr is a
              terminal
    options   of MegaMoE: dispatch_format, combine_format, waves, overlap, ...

    Only this rank's experts are read, and each goes straight to its place. On a CPU linear modules and routers compute
    with the package's kernels, so that a row's bits depend on neither its batch nor the number of ranks; on another
    device they are torch's, which promises no such thing. The result is for inference: it has no gradients.
    model.megamoe_report says what was read. Calls of the group's layers by other threads wait until all is. ValueError,
    on every rank alike, for a checkpoint that is incomplete, truncated or contradicts its config, and for an
    architecture that does not fit; PeerError where a rank is lost; RuntimeError where one calls a layer meanwhile.
    """
    device = check_device(device)
    ranks = EPGroup.of(group, device)
    gc.collect()  # ranks tell layers of one name apart by those that live: models that are gone must be

    def look() -> _Loading:
        for name, value, known in (("experts", experts, EXPERTS), ("dense", dense, DENSE)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        check_scales(scales)
        return _Loading.of(lasting_path_of(path), ranks, device, _Wish(experts, dense, scales), options)

    return _read_together(ranks, device, look, progress).finish()


def regroup(
    model: Any,
    group: EPGroup | dist.ProcessGroup | None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> LoadReport:
    """A loaded model goes on in another group: each rank reads only the experts that came to it.

    All ranks of the new group must call, also those that load() the model only now: those call load() instead, and
    the two wait for each other. Errors as load() has them; a later regroup() then reads what is still missing.
    """
    loaded: _Loading = model.megamoe_loading
    ranks = EPGroup.of(group, loaded.device)
    report = _read_together(ranks, loaded.device, lambda: loaded.again(ranks), progress).report
    model.megamoe_report = report
    return report


def load_tokenizer(path: AnyPath) -> Any:
    """The checkpoint's tokenizer. ValueError where it has none that transformers can read."""
    from transformers import AutoTokenizer

    path = lasting_path_of(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except StrictDataclassError as refusal:  # of the config, which transformers reads for it
        raise ValueError(f"{path}: {' '.join(str(refusal).split())}") from refusal
    except (ValueError, OSError, KeyError, ImportError, TypeError, AttributeError) as refusal:
        said = str(refusal).strip().partition("\n")[0]
        raise ValueError(f"{path} has no tokenizer that can be read: {said}") from refusal
    if not tokenizer.vocab_size or set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # what transformers makes of a model's type alone, where there are no files
        raise ValueError(f"{path} has no tokenizer: no tokenizer.json or vocabulary is there")
    return tokenizer


def _read_together(
    group: EPGroup, device: torch.device, look: Callable[[], _Loading], progress: Callable[[Progress], None] | None
) -> _Loading:
    """What look() gives on every rank, once they agree on it and all is read."""
    looked: list[_Loading] = []

    def terms() -> str:
        looked.append(look())
        wish = looked[0].wish
        return f"{wish.experts} {wish.dense} {wish.scales} {len(looked[0].sources)} blocks"

    try:
        checked = Checked.of(terms)
        with group.turn(_WHAT, device):
            agree_on(group, _WHAT, checked)
            (loading,), begun = looked, time.monotonic()
            with shown(progress, group.rank) as show:
                run_together(group, _WHAT, loading.read, loading.so_far, show)
            loading.note(time.monotonic() - begun)
        return loading
    finally:
        for each in looked:
            each.files.close()


@dataclass(frozen=True, slots=True)
class _Wish:
    experts: str
    dense: str
    scales: str


class _Loading:
    """One rank's load: the checkpoint looked through, a model without weights, then what is read into it."""

    def __init__(
        self,
        files: TensorFiles,
        skeleton: Skeleton,
        sources: dict[str, ExpertSource],
        dense: list[Target],
        routed: dict[str, RoutedExperts],
        device: torch.device,
        wish: _Wish,
    ) -> None:
        self.files, self.skeleton, self.sources, self.dense, self.routed = files, skeleton, sources, dense, routed
        self.device, self.wish = device, wish
        self.report = LoadReport()
        self._linears: dict[str, DenseWeight | FP8Linear] = {}
        self._missing = {name: each.layer.experts.missing for name, each in routed.items()}
        self._kept = sum(len(each.layer.local_experts) for each in routed.values()) - sum(
            map(len, self._missing.values())
        )

    @classmethod
    def of(cls, path: Path, group: EPGroup, device: torch.device, wish: _Wish, options: dict[str, Any]) -> _Loading:
        """Looks through everything. ValueError for what cannot be loaded; no weight is read."""
        config = read_config(path)
        with naming_format(config):
            with TensorFiles.open(path) as looked:
                stored = stored_tensors(looked, fp8_block(config))
                files = TensorFiles(looked.path, looked.entries)
            skeleton = build(path, _stored_dtype(stored))
            naming = name_tensors(skeleton.model, skeleton.tensors, stored)
            targets = {name: target for target in naming.targets.values() for name in made_by(target, skeleton.tensors)}
            sources = {
                each.name: expert_source(each.name, each.structure, targets, skeleton.tensors, skeleton.model)
                for each in skeleton.blocks
            }
            dense = dense_targets(naming, skeleton.model, skeleton.tensors, names_of_experts(skeleton.blocks))
            routed = {
                each.name: _routed(each, sources[each.name], group, device, wish, options) for each in skeleton.blocks
            }
        made = cls(files, skeleton, sources, dense, routed, device, wish)
        made.report.unused = naming.unused
        if group.rank == 0:
            _warn_of_unused(naming.unused, skeleton.model)
        return made

    def again(self, group: EPGroup) -> _Loading:
        """The same for another group: nothing dense, and of the experts those that this rank lacks there."""
        for each in self.routed.values():
            each.layer.regroup(group)
        files = TensorFiles(self.files.path, self.files.entries)
        return _Loading(files, self.skeleton, self.sources, [], self.routed, self.device, self.wish)

    def so_far(self) -> tuple[int, int]:
        """Bytes that were read, of how many that are planned."""
        planned = sum(each.size for target in self.dense for each in target.stored)
        planned += sum(len(missing) * self.sources[name].size_of_one for name, missing in self._missing.items())
        return self.files.bytes_read, planned

    # ---- reading, on a thread of its own ----

    def read(self, stop: threading.Event) -> None:
        """Reads what is planned. The next pieces are read from the disk while one is packed."""
        with torch.no_grad():
            for target in self.dense:
                if stop.is_set():
                    return
                self._read_dense(target)
            self.report.dense_bytes = self.files.bytes_read
            with ThreadPoolExecutor(1, "megamoe read ahead") as pool:
                waiting: deque[tuple[str, int, Future[list[Weight]]]] = deque()
                buffers = [Buffers() for _ in range(_AHEAD + 2)]  # one is packed, the others wait or are read into
                for number, (name, expert) in enumerate(self._experts()):
                    into = buffers[number % len(buffers)]
                    waiting.append((name, expert, pool.submit(self.sources[name].read, self.files, expert, into)))
                    if len(waiting) > _AHEAD:
                        self._put(*waiting.popleft())
                    if stop.is_set():
                        break
                while waiting:
                    name, expert, found = waiting.popleft()
                    if stop.is_set():
                        found.cancel()
                    else:
                        self._put(name, expert, found)

    def _experts(self) -> Iterator[tuple[str, int]]:
        for name, missing in self._missing.items():
            for expert in missing:
                yield name, expert
            self.sources[name].forget()

    def _put(self, name: str, expert: int, found: Future[list[Weight]]) -> None:
        try:
            self.sources[name].put(self.routed[name], expert, found.result(), self.wish.scales)
        except ValueError as refusal:
            raise ValueError(f"{name}: {refusal}") from refusal

    def _read_dense(self, target: Target) -> None:
        model = self.skeleton.model
        if target.converter is None:
            (stored,) = target.stored
            if not self._read_linear(target.name, stored):
                self._set(target.name, stored.read_dense(self.files), f"{stored.values.file}: {stored.name}")
            return
        tensors = {
            pattern: [each.read_dense(self.files) for each in found] for pattern, found in target.sources.items()
        }
        for name, tensor in target.convert(tensors, model, self.skeleton.config).items():
            expected = tuple(self.skeleton.tensors[name].shape)
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} is {list(tensor.shape)} as the checkpoint has it, expected {list(expected)}")
            self._set(name, tensor, name)

    def _set(self, name: str, tensor: Tensor, called: str) -> None:
        """Puts a tensor to its place in the model, in its dtype there. called: its name in a refusal."""
        tensor = tensor.to(self.skeleton.dtypes[name])
        check_values(tensor, called)
        if name.endswith(_TABLE):
            self._check_table(tensor, name, called)
        set_tensor(self.skeleton.model, name, tensor)

    def _check_table(self, table: Tensor, name: str, called: str) -> None:
        """tid2eid [V, K] of a hash-routed layer has experts that there are."""
        above = name.rpartition(".")[0].rpartition(".")[0]
        source = self.sources.get(f"{above}.experts")
        if source is None or not table.numel():
            return
        low, high, experts = int(table.min()), int(table.max()), source.structure.num_experts
        if low < 0 or high >= experts:
            raise ValueError(f"{called} has expert ids {low} to {high}, expected 0 to {experts - 1}")

    def _read_linear(self, name: str, stored: Stored) -> bool:
        """Reads a linear module's weight, where name is of one, to where products read it."""
        module = name.removesuffix(".weight")
        if self.device.type != "cpu" or not self._is_linear(module, name):
            return False
        self._linears[module] = self._linear(stored, self.skeleton.dtypes[name])
        return True

    def _is_linear(self, module: str, name: str) -> bool:
        """Whether name is the weight, tied to no other, of an nn.Linear."""
        tied = getattr(self.skeleton.model, "all_tied_weights_keys", {})
        if module == name or name in tied or name in tied.values():
            return False
        return type(self.skeleton.model.get_submodule(module)) is nn.Linear

    def _linear(self, stored: Stored, dtype: torch.dtype) -> DenseWeight | FP8Linear:
        files, called = self.files, f"{stored.values.file}: {stored.name}"
        if stored.encoding is Encoding.fp8 and self.wish.dense == "checkpoint":
            assert stored.scales is not None
            values, scales = files.read(stored.values), scales_to_float(files.read(stored.scales))
            check_values(values, f"{stored.values.file}: {stored.values.name}")
            check_values(scales, f"{stored.scales.file}: {stored.scales.name}")
            return FP8Linear(values, scales, stored.block)
        if stored.encoding is not Encoding.plain:
            weight = stored.read_dense(files).to(dtype)
            check_values(weight, called)
            return DenseWeight.of(weight)
        held, (outputs, inputs) = DenseWeight(stored.shape, dtype), stored.shape
        step = max(OUTPUTS, _CHUNK_BYTES // (inputs * stored.values.torch_dtype.itemsize) // OUTPUTS * OUTPUTS)
        for first in range(0, outputs, step):
            rows = files.read(stored.values, first=first, count=min(step, outputs - first)).to(dtype)
            check_values(rows, called)
            held.put(first, rows)
        return held

    # ---- after it ----

    def note(self, seconds: float) -> None:
        report = self.report
        report.seconds, report.bytes_read = seconds, self.files.bytes_read
        report.expert_bytes = report.bytes_read - report.dense_bytes
        report.bytes_total = sum(entry.size for entry in self.files.entries.values())
        report.experts_read, report.experts_kept = sum(map(len, self._missing.values())), self._kept
        report.weight_formats = {name: each.layer.weight_format for name, each in self.routed.items()}
        report.quantization_error = {
            name: each.error.relative for name, each in self.sources.items() if each.error.norm
        }
        for each in self.sources.values():
            each.error = RoundingError()

    def _replaced(self, name: str, linear: nn.Linear) -> nn.Module:
        """A linear module as it computes from now on."""
        held = self._linears.pop(name, None)
        bias = None if linear.bias is None else linear.bias.detach()
        if isinstance(held, FP8Linear):
            held.bias = bias
            return held
        return DenseLinear(held or DenseWeight.of(linear.weight.detach()), bias)

    def finish(self) -> Any:
        """The model, its modules replaced by those that hold what was read."""
        model = self.skeleton.model
        for name, routed in self.routed.items():
            set_module(model, name, routed)
        model.tie_weights()
        if self.device.type == "cpu":
            for name, module in list(model.named_modules()):
                if type(module) is nn.Linear:
                    set_module(model, name, self._replaced(name, module))
        left = [name for name, each in (*model.named_parameters(), *model.named_buffers()) if each.is_meta]
        assert not left, left
        model.eval()
        if self.device.type == "cpu":
            compute_in_fixed_order(model)
        else:
            model.to(self.device)
            warnings.warn(
                f"dense products on {self.device} are torch's: a row's bits may depend on its batch",
                KernelWarning,
                stacklevel=3,
            )
        _read_generation_config(model, self.files.path)
        for source in self.sources.values():
            source.let_go()
        self.skeleton = replace(self.skeleton, model=None)  # the model has this, and must not hold itself
        model.megamoe_loading, model.megamoe_report = self, self.report
        model.save_pretrained = _refuse_saving
        model.__reduce_ex__ = _refuse_copy  # what copy and pickle ask for
        return model


def _warn_of_unused(unused: tuple[str, ...], model: Any) -> None:
    """Says which tensors the model has no place for, but for those that its family is known to leave."""
    known = [re.compile(each) for each in may_be_unused(model)]
    left = [name for name in unused if not any(each.search(name) for each in known)]
    if left:
        more = f" and {len(left) - 1} others" if len(left) > 1 else ""
        warnings.warn(
            f"the checkpoint has {left[0]}{more}, for which the model that its config.json describes has no place: "
            "they are not read",
            stacklevel=8,  # of load()'s caller
        )


def _stored_dtype(stored: dict[str, Stored]) -> torch.dtype | None:
    """What most values outside of packed matrices are: what a config without a dtype means."""
    sizes: dict[torch.dtype, int] = {}
    for each in stored.values():
        if each.encoding is Encoding.plain and each.values.dtype in FLOATS:
            sizes[each.values.torch_dtype] = sizes.get(each.values.torch_dtype, 0) + each.size
    return max(sizes, key=sizes.__getitem__) if sizes else None


def _routed(
    block: Block, source: ExpertSource, group: EPGroup, device: torch.device, wish: _Wish, options: dict[str, Any]
) -> RoutedExperts:
    weight_format = source.format(wish.experts)
    source.check(weight_format)
    return RoutedExperts(
        block.structure, block.topk, group, weight_format=weight_format, name=block.name, device=device, **options
    )


def _read_generation_config(model: Any, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except (ValueError, OSError, TypeError) as refusal:
            raise ValueError(f"{path / 'generation_config.json'}: {refusal}") from refusal


def _refuse_saving(*_: object, **__: object) -> None:
    raise ValueError(
        "a model that megamoe.model.load() made cannot be saved, since its weights are packed as products read them: "
        "the checkpoint is what it was, and `megamoe convert` writes it in another format"
    )


def _refuse_copy(protocol: object) -> None:  # noqa: ARG001
    raise TypeError("a model that megamoe.model.load() made is neither copied nor pickled: load it again")
