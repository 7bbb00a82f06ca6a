"""What a combine format costs in accuracy: results as BF16, MXFP8 and MXFP4, against FP64 on random data.

    python -m benchmarks.combine

Relative errors ||a - b|| / ||b|| of the layer's output. "of the combine": against the sum of the same results
unrounded. "of the layer": against every product in FP64 of operands that are rounded as the contract rounds them. "of
all": against FP64 with weights and tokens that are rounded nowhere, what quantising a model that was trained in BF16
comes to; weights that were trained in MXFP4 lose nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.command import natural, positive, run
from megamoe.formats import dequantize_mxfp4, quantize_mxfp4
from megamoe.reference import RESULT_ROUNDING, moe_fp64, relative_error, results, sum_slots
from megamoe.schedule.formats import value_bytes
from megamoe.shape import MoEShape


def round_mxfp4(slots: Tensor) -> Tensor:
    """slots [T, K, H] bfloat16 rounded to MXFP4 and back"""
    return dequantize_mxfp4(quantize_mxfp4(slots))


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {**RESULT_ROUNDING, "mxfp4": round_mxfp4}


def errors(shape: MoEShape, weight_format: str, tokens: int) -> dict[str, tuple[float, float, float]]:
    """By combine format the errors of the combine, of the layer, and of all."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, shape.hidden, generator=rng).to(torch.bfloat16)
    ids = torch.rand(tokens, shape.num_experts, generator=rng).topk(shape.topk).indices
    weights = torch.rand(tokens, shape.topk, generator=rng)
    gate_up = torch.randn(shape.num_experts, shape.linear1_rows, shape.hidden, generator=rng) / shape.hidden**0.5
    down = torch.randn(shape.num_experts, shape.hidden, shape.intermediate, generator=rng) / shape.intermediate**0.5
    dispatch = "mxfp8" if weight_format == "mxfp4" else "bf16"
    given = (shape, hidden, ids, weights, gate_up, down)
    slots = results(*given, weight_format=weight_format, dispatch_format=dispatch)
    sums = slots.to(torch.float64).sum(1)
    operands = moe_fp64(*given, weight_format=weight_format, dispatch_format=dispatch)
    exact = _exact(hidden, ids, weights, gate_up, down)
    return {
        name: tuple(relative_error(sum_slots(rounding(slots)), each) for each in (sums, operands, exact))  # type: ignore[misc]
        for name, rounding in ROUNDINGS.items()
    }


def _exact(hidden: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU experts in FP64 -> [T, H]"""
    total = torch.zeros(hidden.shape, dtype=torch.float64)
    for expert in range(len(gate_up)):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden[token].double() @ gate_up[expert].double().T).chunk(2, -1)
        activated = torch.nn.functional.silu(gate) * up * weights[token, slot, None].double()
        total.index_add_(0, token, activated @ down[expert].double().T)
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=natural, default=256)
    parser.add_argument("--hidden", type=positive, default=1024)
    parser.add_argument("--intermediate", type=positive, default=512)
    parser.add_argument("--num-experts", type=positive, default=16)
    parser.add_argument("--topk", type=positive, default=6)
    asked = parser.parse_args(arguments)
    shape = MoEShape(asked.hidden, asked.intermediate, asked.num_experts, asked.topk)
    experts = f"{shape.num_experts} experts {shape.hidden} x {shape.intermediate}, top-{shape.topk}"
    print(f"{asked.tokens} tokens, {experts}; relative error")
    against = f"{'of the combine':>15} {'of the layer':>13} {'of all':>8}"
    print(f"{'weights':8} {'combine':8} {'bytes a value':>13} {against}")
    for weight_format in ("mxfp4", "bf16"):
        for name, found in errors(shape, weight_format, asked.tokens).items():
            combine, layer, everything = (f"{each:.2%}" for each in found)
            size = f"{value_bytes(name):.4g}"
            print(f"{weight_format:8} {name:8} {size:>13} {combine:>15} {layer:>13} {everything:>8}")


if __name__ == "__main__":
    run(main)
