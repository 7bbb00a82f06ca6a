"""clip_grad_norm_() over experts that are spread over ranks and parameters that are not: each counts once."""

# P ranks   E experts in all   n stacks of experts

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib import import_module
from math import isclose, isnan

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from megamoe.parallel.errors import CallRefusedError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.transport.pairs import Label
from megamoe.routing.agreement import Page, Part, Terms, agree
from megamoe.training.distributed.norms import Norm
from megamoe.training.layer import TrainableMoE, living_layers
from megamoe.training.steps import local

_NAME = "clip_grad_norm_"
_SHARDS = "megamoe.training.distributed.shards"
_SAME = 1e-5  # by which norms of the same gradients may differ: CPUs of two kinds sum in other orders


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_() for models with expert-parallel layers: scales gradients in place -> their norm.

    As torch's, gradients are multiplied by max_norm / (norm + 1e-6) where that is below 1, and the norm, a scalar of
    float32, is that before. It is of all parameters of the model, each once: those of a TrainableMoE over the ranks of
    its group, DTensors over their mesh, others as this rank has them, which must be the same on all ranks of the group:
    shards of a tensor-parallel or a flat parameter are clipped as DTensors, or by themselves.

    Every rank must call, with the same parameters in the same order; parameters without a gradient count as 0. Bits of
    the norm are the same for any number of ranks that experts, or DTensors along dimension 0, are spread over, since
    sums are in a written order (norms.py). They are not promised where a DTensor is sharded along another dimension,
    nor for a norm_type other than 1, 2 and math.inf.

    RuntimeError, on every rank, for a norm that is not finite where error_if_nonfinite; CallRefusedError where ranks do
    not call alike, or differ in the norm of parameters that are no layer's, as where gradients were not summed over
    ranks; PeerError within the deadline of a layer's group for a rank that does not call. ValueError for a norm_type
    that is not above 0, and, on every rank of a layer's group, where one has a sparse gradient.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    total = grad_norm(given, norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {float(total)}, so they cannot be clipped: with "
            "error_if_nonfinite=False they are scaled by it anyway"
        )
    with torch.no_grad():
        for some in _by_mesh(given):
            clip_grads_with_norm_(some, max_norm, total, foreach)
    return total


@torch.no_grad()
def grad_norm(parameters: Tensor | Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of clip_grad_norm_(), a scalar of float32, and nothing is scaled. All that is said there holds."""
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm, layers = Norm(float(norm_type)), _layers_of(given)
    own = [(each, layers[id(each)]) for each in given if id(each) in layers]
    groups = {id(layer.group): layer.group for _, layer in own}.values()
    of_groups = [(group, [(each, layer) for each, layer in own if layer.group is group]) for group in groups]
    sparse = next((x.layout for each in given if (x := each.grad) is not None and x.layout != torch.strided), None)
    if sparse is not None:
        complaint = ValueError(f"a gradient is {sparse}: only dense ones have a norm here")
        for group, of_group in of_groups:
            if group.transport is not None:
                with group.turn(_NAME, of_group[0][1].device), group.unbroken(_NAME, 0):
                    _agree(group, of_group, norm, complaint)
        raise complaint
    device = next((each.grad.device for each in given if each.grad is not None), torch.device("cpu"))

    def joined(partials: Iterable[Tensor]) -> Tensor:
        found = [each.to(device) for each in partials]
        return norm.joined(torch.stack(found) if found else torch.zeros(0, dtype=torch.float64, device=device))

    plain = [each for each in given if id(each) not in layers and not hasattr(each.grad, "to_local")]
    added = {id(each): _of_others(each, norm) for each in plain}
    mine = joined(added.values()) if own else torch.zeros(())
    for group, of_group in of_groups:
        added |= _of_experts(group, of_group, mine, norm)
    return norm.total(joined(added[id(each)] if id(each) in added else _of_others(each, norm) for each in given))


def _layers_of(parameters: Sequence[Tensor]) -> dict[int, TrainableMoE]:
    """The layer of each that is one's master, by the parameter's id. ValueError as TrainableExperts.masters has it.

    What became of the experts of other layers of this process, half built or parametrized, is nothing to these.
    """
    asked = {id(each) for each in parameters}
    owners = {id(each): layer for layer in living_layers() for each in layer.experts.parameters() if id(each) in asked}
    for layer in {id(each): each for each in owners.values()}.values():
        _ = layer.experts.masters
    return owners


def _of_others(parameter: Tensor, norm: Norm) -> Tensor:
    """What a parameter that no layer has adds to the norm, a scalar of float64."""
    if parameter.grad is None:
        return torch.zeros((), dtype=torch.float64, device=parameter.device)
    slices = norm.of_slices(local(parameter.grad))
    if hasattr(parameter.grad, "to_local"):
        slices = import_module(_SHARDS).summed_over_shards(parameter.grad, slices, norm.largest)
    return norm.joined(slices)


def _of_experts(
    group: EPGroup, own: Sequence[tuple[Tensor, TrainableMoE]], others: Tensor, norm: Norm
) -> dict[int, Tensor]:
    """What each stack of experts adds over all ranks of the group, a scalar of float64, by the parameter's id.

    others: what parameters of no layer add on this rank, and must add on all of them
    """
    sizes = [Placement(layer.shape.num_experts, group.size) for _, layer in own]
    partials = torch.zeros(len(own) + 1, max(each.most for each in sizes), dtype=torch.float64, device="cpu")
    partials[-1, 0] = others
    for row, (parameter, _) in zip(partials, own, strict=False):
        if parameter.grad is not None:
            slices = norm.of_slices(local(parameter.grad))
            row[: len(slices)] = slices
    everyones = _gathered(group, partials, own, norm)
    found = {}
    for index, ((parameter, _), placement) in enumerate(zip(own, sizes, strict=True)):
        each = [everyones[rank, index, : len(placement.experts(rank))] for rank in range(group.size)]
        found[id(parameter)] = norm.joined(torch.cat(each))
    return found


def _gathered(group: EPGroup, partials: Tensor, own: Sequence[tuple[Tensor, TrainableMoE]], norm: Norm) -> Tensor:
    """Every rank's partials: [n, most] float64 -> [P, n, most], after all have agreed on what is summed."""
    if group.transport is None:
        return partials.unsqueeze(0)
    device = own[0][1].device
    with group.turn(_NAME, device), group.unbroken(_NAME, 0):
        _agree(group, own, norm, None)
        pages = group.transport.gather(partials.view(torch.uint8).flatten(), Label(_NAME, "more counts"))
        everyones = pages.view(torch.float64).view(group.size, *partials.shape)
        _refuse_others(group, [float(norm.total(each)) for each in everyones[:, -1, 0]])
    return everyones


def _agree(
    group: EPGroup, own: Sequence[tuple[Tensor, TrainableMoE]], norm: Norm, complaint: ValueError | None
) -> None:
    """CallRefusedError, on all ranks, where they do not sum alike, or one has a complaint."""
    agree(group, Page(_terms(group, own, norm), group.host), 0, Part(0, np.zeros((2, 1), np.int32), 0.0), complaint)


def _refuse_others(group: EPGroup, norms: Sequence[float]) -> None:
    """CallRefusedError, on all ranks, where parameters of no layer have another norm than on rank 0."""
    for rank, each in enumerate(norms):
        if not isclose(each, norms[0], rel_tol=_SAME) and not (isnan(each) and isnan(norms[0])):
            raise CallRefusedError(
                f"gradients of parameters that are no layer's differ: their norm is {norms[0]:g} on {group.named(0)}, "
                f"{each:g} on {group.named(rank)}; sum them over ranks first, by sum_gradients() or DDP"
            )


def _terms(group: EPGroup, own: Sequence[tuple[Tensor, TrainableMoE]], norm: Norm) -> Terms:
    """What ranks must have in common: told apart from a layer's call, and by the stacks that are summed."""
    sizes = ", ".join(f"{layer.name} {'x'.join(map(str, parameter.shape[1:]))}" for parameter, layer in own)
    return Terms(
        layer=f"{_NAME} of {sizes}",
        number=1,
        hidden=0,
        intermediate=0,
        num_experts=max(layer.shape.num_experts for _, layer in own),
        topk=0,
        activation=f"norm {norm.p:g}",
        bias=False,
        node_limited=group.node_limited,
        shared_memory=group.shared_memory,
        training="",
        weight_format="",
        dispatch_format="",
        combine_format="",
        arithmetic="",
        waves="",
        transport="",
    )


def _by_mesh(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters that torch can scale together: it takes DTensors of one mesh, or none."""
    found: dict[object, list[Tensor]] = defaultdict(list)
    for each in parameters:
        if each.grad is not None:
            found[getattr(each.grad, "device_mesh", None)].append(each)
    return list(found.values())
