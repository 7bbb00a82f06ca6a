"""What must hold of the layer on one rank: error, bits, and on a GPU that it waits for nothing and takes no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_kernels.findings import BOUND, Check
from benchmarks.gpu_kernels.measure.layer import (
    CHECKED,
    DISPATCH_FORMATS,
    Inputs,
    TorchLayer,
    inputs,
    layer,
    weights,
)
from benchmarks.gpu_kernels.process import first_line
from megamoe import MegaMoE
from megamoe.formats import MXFP4, dequantize_mxfp4
from megamoe.reference import moe_fp64, relative_error
from megamoe.training import TrainableMoE
from megamoe.training.reference import Problem, moe_backward_fp64

_CALLS = 20


def layer_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Of a small shape; two of each format are of a GPU alone."""
    of_all, of_gpus = (check_against_fp64, check_bits, check_training), (check_waits, check_memory)
    for weight_format in DISPATCH_FORMATS:
        for check in (*of_all, *(of_gpus if device.type == "cuda" else ())):
            yield f"{weight_format} layer, {check.__name__}", partial(check, weight_format, device)
    yield "torch's sequence", partial(check_torch_layer, device)


def check_against_fp64(weight_format: str, device: torch.device) -> Check:
    """Of the same quantised operands, summed in FP64 on the host by the reference."""
    given = inputs(CHECKED, 33, device)
    experts = (as_float(each) for each in weights(CHECKED, weight_format, device))
    wanted = moe_fp64(
        CHECKED,
        *(each.cpu() for each in given),
        *experts,
        weight_format=weight_format,
        dispatch_format=DISPATCH_FORMATS[weight_format],
    )
    error = relative_error(layer(CHECKED, weight_format, device)(*given).cpu(), wanted)
    name = f"{weight_format} layer against FP64"
    return Check(name, error < BOUND, f"error {error:.3g}, must be below {BOUND:g}")


def as_float(weight: MXFP4 | Tensor) -> Tensor:
    """On the host, exactly: float32 of MXFP4, bfloat16 as it is."""
    if isinstance(weight, MXFP4):
        return dequantize_mxfp4(MXFP4(weight.packed.cpu(), weight.scales.cpu()), torch.float32)
    return weight.cpu()


def check_bits(weight_format: str, device: torch.device) -> Check:
    """The same output in another run, and for a token that comes alone."""
    made, given = layer(CHECKED, weight_format, device), inputs(CHECKED, 257, device)
    first = made(*given).clone()
    again = torch.equal(made(*given), first)
    alone = torch.equal(made(*(each[200:201].clone() for each in given))[0], first[200])
    return Check(f"{weight_format} layer, bits in another run and of a token alone", again and alone)


def check_training(weight_format: str, device: torch.device) -> Check:
    """All gradients against FP64 of the same quantised operands on the host, and their bits in another run."""
    given, wire = inputs(CHECKED, 33, device), DISPATCH_FORMATS[weight_format]
    gate_up, down = (as_float(each).to(torch.float32) for each in weights(CHECKED, weight_format, device))
    gradient = inputs(CHECKED, 33, device, seed=1)[0]
    made = TrainableMoE(CHECKED, weight_format=weight_format, dispatch_format=wire, device=device)
    made.load_experts(gate_up, down)

    def found() -> dict[str, Tensor]:
        hidden, ids, topk_weights = (each.clone() for each in given)
        leaves = {"hidden": hidden, "topk_weights": topk_weights, **dict(made.experts.named_parameters())}
        out = made(hidden.requires_grad_(), ids, topk_weights.requires_grad_())
        gradients = torch.autograd.grad(out, list(leaves.values()), gradient)
        return {name: each.cpu() for name, each in zip(leaves, gradients, strict=True)}

    first, again = found(), found()
    hidden, ids, topk_weights = (each.cpu() for each in given)
    problem = Problem(
        CHECKED, hidden, ids, topk_weights, gate_up, down, weight_format=weight_format, dispatch_format=wire
    )
    exact = moe_backward_fp64(problem, gradient.cpu())
    errors = {name: relative_error(each, getattr(exact, name)) for name, each in first.items()}
    same = all(torch.equal(each, again[name]) for name, each in first.items())
    said = ", ".join(f"{name} {error:.3g}" for name, error in errors.items())
    passed = same and all(error < BOUND for error in errors.values())
    return Check(f"{weight_format} training, bits in another run, gradients against FP64", passed, f"errors {said}")


def check_waits(weight_format: str, device: torch.device) -> Check:
    """A call that was made before makes the host wait for nothing."""
    made, given = layer(CHECKED, weight_format, device), inputs(CHECKED, 33, device)
    _warmed_up(made, given)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    name = f"{weight_format} layer waits for nothing"
    try:
        made(*given)
    except RuntimeError as waited:
        return Check(name, False, first_line(waited))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return Check(name, True)


def check_memory(weight_format: str, device: torch.device) -> Check:
    """Later calls ask the driver for no memory."""
    made, given = layer(CHECKED, weight_format, device), inputs(CHECKED, 33, device)
    _warmed_up(made, given)
    before = _asked_of_the_driver(device)
    for _ in range(_CALLS):
        made(*given)
    torch.cuda.synchronize(device)
    after = _asked_of_the_driver(device)
    name = f"{weight_format} layer asks for no memory in {_CALLS} calls"
    return Check(name, before == after, f"allocations, segments {before} before, {after} after")


def check_torch_layer(device: torch.device) -> Check:
    """What the layer is held against computes the same."""
    gate_up, down = weights(CHECKED, "bf16", device)
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    given = inputs(CHECKED, 33, device)
    error = relative_error(
        TorchLayer(gate_up, down, CHECKED.swiglu_limit)(*given), layer(CHECKED, "bf16", device)(*given)
    )
    return Check("torch's sequence computes what the BF16 layer does", error < 2 * BOUND, f"error {error:.3g}")


def _warmed_up(made: MegaMoE, given: Inputs) -> None:
    for _ in range(3):
        made(*given)
    torch.cuda.synchronize(given[0].device)


def _asked_of_the_driver(device: torch.device) -> tuple[int, int]:
    stats = torch.cuda.memory_stats(device)
    return int(stats.get("num_device_alloc", 0)), int(stats.get("segment.all.current", 0))
