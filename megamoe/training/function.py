"""The layer as torch's autograd sees it: one node, whose backward is one call of all ranks."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from megamoe.training.call import ExpertGradients
from megamoe.training.kept import Kept

if TYPE_CHECKING:
    from megamoe.training.layer import TrainableMoE


class Apply(Function):
    """forward(layer, hidden, topk_ids, topk_weights, *masters) -> output; see TrainableMoE."""

    @staticmethod
    def forward(
        ctx: Any, layer: TrainableMoE, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, *masters: Tensor
    ) -> Tensor:
        out, kept, ctx.origin = layer.forward_and_keep(hidden, topk_ids, topk_weights)
        ctx.layer, ctx.dtype = layer, hidden.dtype
        again = (hidden,) if layer.saved == "dispatch-again" else ()
        ctx.save_for_backward(topk_ids, topk_weights, *kept.tensors(), *masters, *again)
        ctx.num_masters = len(masters)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = _gradients(ctx, gradient)
        return _FirstOrder.of(ctx.layer.name, found) if torch.is_grad_enabled() else found

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        del tangents
        raise RuntimeError(f"layer {ctx.layer.name!r} has no forward-mode derivative: use backward()")


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # read before the call takes the group's turn: a checkpoint runs the forward again to get them
    topk_ids, topk_weights, *saved = ctx.saved_tensors
    size = len(fields(Kept))
    kept, masters, hidden = (
        Kept(*saved[:size]),
        saved[size : size + ctx.num_masters],
        saved[size + ctx.num_masters :],
    )
    of_masters = ExpertGradients.like(masters, ctx.needs_input_grad[4:])
    of_hidden, of_weights = ctx.layer.backward_of(
        ctx.origin, kept, topk_ids, topk_weights, gradient, hidden[0] if hidden else None, of_masters
    )
    return None, of_hidden.to(ctx.dtype), None, of_weights, *of_masters.each()[: ctx.num_masters]


class _FirstOrder(Function):
    """Gradients that refuse a derivative of their own: as constants they would leave a term of a loss out unseen."""

    @classmethod
    def of(cls, name: str, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        asked = torch.zeros((), requires_grad=True)
        return tuple(
            None if each is None else cls.apply(name, asked, each)  # type: ignore[no-untyped-call]
            for each in gradients
        )

    @staticmethod
    def forward(ctx: Any, name: str, asked: Tensor, gradient: Tensor) -> Tensor:
        del asked
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        del gradient
        raise RuntimeError(
            f"layer {ctx.name!r} has no gradients of gradients: a loss must not depend on a gradient that passed it"
        )
