"""DeepSeek-V4's expert layers on a group of ranks: router, shared expert and MegaMoE, read from a checkpoint."""

# T tokens of this rank   H hidden   I intermediate

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megamoe.activations import SWIGLU
from megamoe.ambient import Keeping, eager, undisturbed
from megamoe.execution.checks import check_gradient
from megamoe.execution.journeys import CallRecord
from megamoe.execution.ops import activate
from megamoe.execution.products import linear
from megamoe.kernels.gating import tables_of
from megamoe.layer import MegaMoE
from megamoe.model.deepseek_v4.checkpoint import Checkpoint, E4M3Blocks
from megamoe.model.router import Router
from megamoe.parallel.group import EPGroup
from megamoe.routing.waves import Waves


class KeepsDtypes(nn.Module):
    """A module whose tensors keep the checkpoint's dtypes: .half() and the like may move them and not round them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtypes:
        super()._apply(Keeping(fn, type(self).__name__, moves=True), recurse)  # type: ignore[no-untyped-call]
        return self


class SharedExpert(KeepsDtypes):
    """The expert that every token visits, on the token's own rank: held in FP8, computed in BF16, clamped alike."""

    def __init__(self, gate: E4M3Blocks, up: E4M3Blocks, down: E4M3Blocks, limit: float) -> None:
        super().__init__()
        self.activation = SWIGLU.with_limit(limit)
        for name, weight in (("gate", gate), ("up", up), ("down", down)):
            self.register_buffer(name, weight.values)
            self.register_buffer(f"{name}_scales", weight.scales)

    @eager
    def forward(self, hidden: Tensor) -> Tensor:
        """[T, H] bfloat16 -> [T, H] bfloat16. ValueError where a gradient is asked for."""
        check_gradient("hidden", hidden)
        with undisturbed(hidden.device):
            gate_up = torch.cat((self._linear(hidden, "gate"), self._linear(hidden, "up")), 1)
            ones = torch.ones(len(hidden), dtype=torch.float32, device=hidden.device)
            tables = tables_of(self.activation, hidden.device)
            return self._linear(activate(gate_up, ones, tables, quantized=False), "down")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight = E4M3Blocks(self.get_buffer(name), self.get_buffer(f"{name}_scales"))
        return linear(x, weight.dequantize())


class MoEBlock(KeepsDtypes):
    """hidden + experts(norm(hidden)): what stands after the attention of one DeepSeek-V4 layer."""

    def __init__(self, norm: Tensor, eps: float, router: Router, routed: MegaMoE, shared: SharedExpert | None) -> None:
        super().__init__()
        self.eps, self.router, self.routed, self.shared = eps, router, routed, shared
        self.register_buffer("norm", norm.to(torch.float64))

    @eager
    def forward(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """hidden [T, H] bfloat16, token_ids [T] int64 -> [T, H] bfloat16. Errors as MegaMoE.forward() has them."""
        asked = hidden.requires_grad and torch.is_grad_enabled()
        with undisturbed(hidden.device):
            normed = self._normalise(hidden)
            topk_ids, topk_weights = self.router(normed, token_ids)
        # a gradient that is asked for is refused there, by all ranks together
        routed: Tensor = self.routed(normed.requires_grad_(asked), topk_ids, topk_weights)
        with undisturbed(hidden.device):
            out = hidden.to(torch.float32) + routed
            if self.shared is not None:
                out += self.shared(normed)
            return out.to(torch.bfloat16)

    def _normalise(self, hidden: Tensor) -> Tensor:
        """RMSNorm in FP64, rounded to BF16 once."""
        wide = hidden.to(torch.float64)
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return wide.mul_(scale).mul_(self.get_buffer("norm")).to(torch.bfloat16)


class ExpertStack(nn.Module):
    """Every expert layer of a checkpoint, one after another, without the attention between them.

    load() reads only what this rank needs: its own experts, and the routers, norms and shared experts that every
    rank has.
    """

    def __init__(self, blocks: list[MoEBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        group: EPGroup | None = None,
        *,
        waves: Waves = "auto",
        dispatch_format: str = "mxfp8",
        combine_format: str = "bf16",
        device: torch.device | str = "cpu",
    ) -> ExpertStack:
        """ValueError names the tensor that is missing or has another shape or dtype than the config asks for."""
        formats = dispatch_format, combine_format
        with undisturbed(torch.device(device)):
            return cls(
                [
                    _load_block(checkpoint, layer, group, waves, formats, device)
                    for layer in range(checkpoint.config.num_hidden_layers)
                ]
            )

    def regroup(self, checkpoint: Checkpoint, group: EPGroup | None) -> tuple[int, int]:
        """Goes on in another group -> experts that this rank had already, and those that were read, over all layers.

        Only experts that this rank lacks there are read. ValueError as load() has it; a later regroup() then reads
        what is still missing.
        """
        kept = read = 0
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, MoEBlock)
            missing = block.routed.regroup(group)
            with undisturbed(block.routed.device):
                _load_experts(checkpoint, layer, block.routed, missing)
            kept, read = kept + len(block.routed.local_experts) - len(missing), read + len(missing)
        return kept, read

    def forward(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """hidden [T, H] bfloat16, token_ids [T] int64 -> [T, H] bfloat16. Errors as MegaMoE.forward() has them."""
        for block in self.blocks:
            hidden = block(hidden, token_ids)
        return hidden

    @property
    def calls(self) -> list[CallRecord]:
        """What each layer did in the latest forward."""
        return [block.routed.last_call for block in self.blocks if isinstance(block, MoEBlock)]

    @property
    def num_local_experts(self) -> int:
        """Routed experts on this rank, over all layers."""
        return sum(len(block.routed.local_experts) for block in self.blocks if isinstance(block, MoEBlock))

    @property
    def expert_bytes(self) -> int:
        """Bytes of this rank's routed experts."""
        return sum(block.routed.memory_bytes for block in self.blocks if isinstance(block, MoEBlock))


def _load_block(
    checkpoint: Checkpoint,
    layer: int,
    group: EPGroup | None,
    waves: Waves,
    formats: tuple[str, str],
    device: torch.device | str,
) -> MoEBlock:
    config = checkpoint.config
    hashed = config.is_hash_routed(layer)
    router = Router(
        checkpoint.gate_weight(layer),
        config.num_experts_per_tok,
        config.routed_scaling_factor,
        bias=None if hashed else checkpoint.gate_bias(layer),
        table=checkpoint.gate_table(layer) if hashed else None,
    )
    name = f"layers.{layer}.ffn"
    dispatch, combine = formats
    routed = MegaMoE(
        config.shape,
        group,
        waves=waves,
        dispatch_format=dispatch,
        combine_format=combine,
        device=device,
        name=name,
    )
    _load_experts(checkpoint, layer, routed, list(routed.local_experts))
    shared = SharedExpert(*checkpoint.shared_expert(layer), config.swiglu_limit) if config.n_shared_experts else None
    return MoEBlock(checkpoint.norm(layer), config.rms_norm_eps, router, routed, shared).to(device)


def _load_experts(checkpoint: Checkpoint, layer: int, routed: MegaMoE, experts: list[int]) -> None:
    for expert in experts:
        try:
            routed.load_expert(expert, *checkpoint.expert(layer, expert))
        except ValueError as refusal:
            raise ValueError(f"{routed.name}: {refusal}") from refusal
