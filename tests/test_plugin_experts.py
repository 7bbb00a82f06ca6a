"""RoutedExperts takes weights as checkpoints have them and tokens as transformers brings them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megamoe.activations import Activation
from megamoe.formats import MXFP4, quantize_mxfp4
from megamoe.launch.ranks import LocalRanks
from megamoe.model import RoutedExperts, Structure
from megamoe.model.packed import PackedExperts, packing_of
from megamoe.model.private import _release
from megamoe.parallel.group import EPGroup
from megamoe.reference import moe
from tests.cases import make_batch

GPT_OSS = Structure(
    64, 96, 5, Activation(alpha=1.702, up_shift=1.0, limit=7.0), is_transposed=True, is_interleaved=True, has_bias=True
)
PLAIN = Structure(64, 96, 5)
UNGATED = Structure(64, 96, 5, Activation("relu2", gated=False), is_transposed=True)


def weights(structure: Structure) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stacks as the layer has them: gates first [E, 2I, H], [E, H, I], and biases"""
    rng = torch.Generator().manual_seed(0)
    rows = structure.activation.rows_per_output * structure.intermediate
    first = torch.randn(structure.num_experts, rows, structure.hidden, generator=rng) / 4
    down = torch.randn(structure.num_experts, structure.hidden, structure.intermediate, generator=rng) / 8
    first_bias = torch.randn(structure.num_experts, rows, generator=rng)
    down_bias = torch.randn(structure.num_experts, structure.hidden, generator=rng)
    return first.bfloat16(), down.bfloat16(), first_bias.bfloat16(), down_bias.bfloat16()


def interleaved(rows: Tensor) -> Tensor:
    """gate0, gate1, up0, up1 -> gate0, up0, gate1, up1"""
    return torch.stack(rows.chunk(2), 1).flatten(0, 1)


def make(structure: Structure, group: EPGroup | None = None, weight_format: str = "bf16") -> RoutedExperts:
    """Loaded from the orientation that the structure says."""
    first, down, first_bias, down_bias = weights(structure)
    routed = RoutedExperts(structure, 3, group, weight_format=weight_format)
    for expert in routed.layer.local_experts:
        one = interleaved(first[expert]) if structure.is_interleaved else first[expert]
        biases = (interleaved(first_bias[expert]), down_bias[expert]) if structure.has_bias else (None, None)
        if weight_format == "mxfp4":  # packed along inputs, so never transposed
            routed.load(expert, quantize_mxfp4(one), quantize_mxfp4(down[expert]), *biases)
        elif structure.is_transposed:
            routed.load(expert, one.T, down[expert].T, *biases)
        else:
            routed.load(expert, one, down[expert], *biases)
    return routed


@pytest.mark.parametrize("weight_format", ["bf16", "mxfp4"])
@pytest.mark.parametrize("structure", [GPT_OSS, PLAIN, UNGATED], ids=["gpt_oss", "plain", "ungated_transposed"])
def test_a_checkpoint_s_orientation_gives_the_oracle_s_bits(structure: Structure, weight_format: str) -> None:
    first, down, first_bias, down_bias = weights(structure)
    batch = make_batch(structure.shape(3), 40)
    expected = moe(
        structure.shape(3),
        batch.hidden,
        batch.ids,
        batch.weights,
        first,
        down,
        gate_up_bias=first_bias if structure.has_bias else None,
        down_bias=down_bias if structure.has_bias else None,
        weight_format=weight_format,
        dispatch_format="mxfp8" if weight_format == "mxfp4" else "bf16",
    )
    assert torch.equal(make(structure, weight_format=weight_format)(batch.hidden, batch.ids, batch.weights), expected)


FP4 = {"fp8": {"quant_method": "fp8", "expert_dtype": "fp4"}, "mxfp4": {"quant_method": "mxfp4"}}


@pytest.mark.parametrize("method", sorted(FP4))
def test_packed_matrices_are_those_of_the_checkpoint(method: str) -> None:
    structure, packing = GPT_OSS if method == "mxfp4" else PLAIN, packing_of(FP4[method])
    experts = PackedExperts(structure, packing)
    assert all(parameter.device.type == "meta" for parameter in experts.parameters())
    quantized = quantize_mxfp4(weights(structure)[0])
    values = quantized.packed.view(packing.values_dtype)
    values = values.view(*quantized.scales.shape, 16) if packing.blocked else values
    for name, tensor in ((packing.values, values), (packing.scales, quantized.scales.view(packing.scales_dtype))):
        parameter = experts.get_parameter(f"gate_up_proj{name}")
        assert parameter.shape == tensor.shape
        assert parameter.dtype == tensor.dtype
        experts._parameters[f"gate_up_proj{name}"] = torch.nn.Parameter(tensor, requires_grad=False)
    matrix = experts.matrix("gate_up_proj", 2)
    assert isinstance(matrix, tuple)
    found = MXFP4.from_bytes(*matrix)
    assert torch.equal(found.packed, quantized.packed[2])
    assert torch.equal(found.scales, quantized.scales[2])


def test_packed_experts_refuse_sizes_that_blocks_do_not_divide() -> None:
    with pytest.raises(ValueError, match="down_proj has 48 inputs, which is not a multiple of 32"):
        PackedExperts(Structure(64, 48, 5), packing_of(FP4["fp8"]))


def test_fp8_experts_with_transposed_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="gates and ups in turns, are not supported"):
        PackedExperts(GPT_OSS, packing_of({"quant_method": "fp8"}))


def test_slots_of_foreign_experts_add_nothing() -> None:
    """transformers marks them by the number of local experts or more, padding by -1"""
    routed, batch = make(PLAIN), make_batch(PLAIN.shape(3), 20, mask=False)
    masked, foreign = batch.ids.clone(), batch.ids.clone()
    masked[::2, 1], foreign[::2, 1] = -1, 5
    foreign[0, 1] = 77
    expected = routed(batch.hidden, masked, batch.weights)
    assert torch.equal(routed(batch.hidden, foreign, batch.weights), expected)
    assert not torch.equal(routed(batch.hidden, batch.ids, batch.weights), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_output_has_the_dtype_of_the_tokens(dtype: torch.dtype) -> None:
    routed, batch = make(PLAIN), make_batch(PLAIN.shape(3), 20)
    found = routed(batch.hidden.to(dtype), batch.ids.to(torch.int32), batch.weights.to(torch.float64))
    assert found.dtype == dtype
    assert torch.equal(found, routed(batch.hidden.to(dtype).bfloat16(), batch.ids, batch.weights).to(dtype))


def in_turns(group: EPGroup) -> Tensor | None:
    routed, batch = make(GPT_OSS, group), make_batch(GPT_OSS.shape(3), 20)
    found = None
    for rank in range(group.size):
        if rank == group.rank:
            found = routed(batch.hidden, batch.ids, batch.weights)
        else:
            routed.idle()
    return found


def test_ranks_without_tokens_stay_in_step(ranks: LocalRanks) -> None:
    batch = make_batch(GPT_OSS.shape(3), 20)
    expected = make(GPT_OSS)(batch.hidden, batch.ids, batch.weights)
    assert all(found is not None and torch.equal(found, expected) for found in ranks.run(in_turns, size=2))


@pytest.mark.parametrize("several", [True, False], ids=["several_groups", "one_group"])
def test_fsdp_of_any_torch_lets_go_of_the_weights(several: bool) -> None:
    """torch before 2.13 has one group of parameters a module"""
    parameter = SimpleNamespace(sharded_param=1, _sharded_param_data=2, _unsharded_param=3, kept=4)
    parameter.free_unsharded_param = lambda: None
    group = SimpleNamespace(fsdp_params=[parameter])
    state = SimpleNamespace(_fsdp_param_groups=[group]) if several else SimpleNamespace(_fsdp_param_group=group)
    _release(state)
    assert vars(parameter).keys() == {"kept", "free_unsharded_param"}
    assert not any(vars(state).values())
    _release(state)
