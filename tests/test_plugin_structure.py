"""What an experts module is, is read from its weights and found with numbers; what is otherwise is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, GptOssConfig, NemotronHConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling2.configuration_inkling2 import Inkling2TextConfig
from transformers.models.inkling2.modeling_inkling2 import Inkling2Experts
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from megamoe.activations import SWIGLU, Activation
from megamoe.model import Structure, read_structure
from megamoe.shape import MoEShape


class Experts(nn.Module):
    """Gated experts as transformers writes them: [gate; up] stacked, silu."""

    def __init__(self, num_experts: int = 4, hidden: int = 16, inner: int = 8) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))
        self.act_fn: Callable[[Tensor], Tensor] = nn.functional.silu

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for token, slot in torch.cartesian_prod(*(torch.arange(size) for size in top_k_index.shape)).tolist():
            expert = int(top_k_index[token, slot])
            inner = self._apply_gate(self.gate_up_proj[expert] @ hidden_states[token])
            out[token] += top_k_weights[token, slot] * (self.down_proj[expert] @ inner)
        return out


def test_sizes_come_from_the_weights() -> None:
    assert read_structure(Experts(5, 32, 24)) == Structure(hidden=32, intermediate=24, num_experts=5)
    assert read_structure(Experts(5, 32, 24)).shape(topk=3) == MoEShape(32, 24, 5, 3)


def on_meta(make: Callable[[], nn.Module]) -> Structure:
    with torch.device("meta"):
        experts = make()
    return read_structure(experts)


def test_deepseek_v4_clamps_before_silu() -> None:
    config = DeepseekV4Config(swiglu_limit=7.5)
    found = on_meta(lambda: DeepseekV4Experts(config))
    assert found == Structure(config.hidden_size, config.moe_intermediate_size, 256, SWIGLU.with_limit(7.5))


def test_step3p7_clamps_after_silu_and_is_not_taken_for_deepseek_v4() -> None:
    found = on_meta(lambda: Step3p7Experts(Step3p7TextConfig(), swiglu_limit=7.0))
    assert found.activation == Activation(limit=7.0, clamp="after")
    assert on_meta(lambda: Step3p7Experts(Step3p7TextConfig())).activation == SWIGLU


def test_gpt_oss_is_transposed_interleaved_and_biased() -> None:
    found = on_meta(lambda: GptOssExperts(GptOssConfig(hidden_size=96, intermediate_size=64, num_local_experts=6)))
    assert found == Structure(
        96,
        64,
        6,
        Activation(alpha=1.702, up_shift=1.0, limit=7.0),
        is_transposed=True,
        is_interleaved=True,
        has_bias=True,
    )


def test_inkling2_has_soft_limits() -> None:
    config = Inkling2TextConfig(mlp_gate_softcap=4.0, mlp_up_softcap=25.0)
    assert on_meta(lambda: Inkling2Experts(config)).activation == Activation(limit=4.0, clamp="tanh", up_limit=25.0)


def test_nemotron_h_has_no_gate_and_experts_narrower_than_the_model() -> None:
    config = NemotronHConfig(hidden_size=256, moe_latent_size=64, moe_intermediate_size=96, n_routed_experts=8)
    assert on_meta(lambda: NemotronHExperts(config)) == Structure(64, 96, 8, Activation("relu2", gated=False))


def test_weights_without_a_place_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"MuseSparkExperts does not fit.*no place for: post_expert_norm.weight"):
        on_meta(lambda: MuseSparkExperts(MuseSparkTextConfig()))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nn.SiLU(), SWIGLU),
        (nn.GELU(approximate="tanh"), Activation("gelu_tanh")),
        (lambda x: x * torch.sigmoid(1.702 * x), Activation(alpha=1.702)),
        (lambda x: x.relu().square(), Activation("relu2")),
        (lambda x: nn.functional.silu(x.float()).to(x.dtype), SWIGLU),
        (lambda x: nn.functional.gelu(x.float(), approximate="tanh").to(x.dtype), Activation("gelu_tanh")),
    ],
    ids=["silu", "gelu_tanh", "quick_gelu", "relu2", "silu_in_fp32", "gelu_in_fp32"],
)
def test_functions_are_found(function: Callable[[Tensor], Tensor], expected: Activation) -> None:
    experts = Experts()
    experts.act_fn = function
    assert read_structure(experts).activation == expected


@pytest.mark.parametrize("limit", [0.5, 1.0, 7.0, 10.0, 123.456, 5e4])
@pytest.mark.parametrize("when", ["before", "after"])
def test_limits_are_found(limit: float, when: str) -> None:
    class Clamped(Experts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, -1)
            gate = self.act_fn(gate.clamp(max=limit)) if when == "before" else self.act_fn(gate).clamp(max=limit)
            return gate * up.clamp(-limit, limit)

    found = read_structure(Clamped()).activation
    # silu(123) is 123: there the two are one
    assert found == Activation(limit=limit, clamp=when if limit < 100 else "before")


def test_a_limit_of_up_alone_is_one_of_the_gate_beyond_all_values() -> None:
    class Clamped(Experts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, -1)
            return nn.functional.silu(gate) * up.clamp(-7.0, 7.0)

    largest = torch.finfo(torch.bfloat16).max
    assert read_structure(Clamped()).activation == Activation(limit=largest, clamp="after", up_limit=7.0)


def exact_gelu(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.gelu(gate) * up


def leaky(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.leaky_relu(gate) * up


def clamps_gate_only(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate.clamp(max=7.0)) * up


def clamps_gate_from_below_too(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate.clamp(-7.0, 7.0)) * up.clamp(-7.0, 7.0)


def up_first(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(up) * gate


def sums(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) + up


@pytest.mark.parametrize(
    "gating",
    [exact_gelu, leaky, clamps_gate_only, clamps_gate_from_below_too, up_first, sums],
    ids=lambda gating: gating.__name__,
)
def test_an_activation_that_is_not_in_the_description_is_refused(gating: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Other(Experts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return gating(*gate_up.chunk(2, -1))

    with pytest.raises(ValueError, match=r"Other does not fit the layer: its (activation|output)"):
        read_structure(Other())


def test_a_forward_that_does_more_is_refused() -> None:
    class Scaled(Experts):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return 1.01 * super().forward(hidden_states, top_k_index, top_k_weights)

    class Squared(Experts):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return super().forward(hidden_states, top_k_index, top_k_weights.square())

    class Skips(Experts):
        """Has an _apply_gate and uses another."""

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            other = Experts()
            other._parameters, other.act_fn = self._parameters, torch.tanh
            return other(hidden_states, top_k_index, top_k_weights)

    for experts in (Scaled(), Squared(), Skips()):
        with pytest.raises(ValueError, match="its forward is not the weighted sum"):
            read_structure(experts)


def test_flags_that_contradict_what_is_computed_are_refused() -> None:
    interleaved, transposed, ungated = Experts(), Experts(), Experts()
    interleaved.is_concatenated = False  # type: ignore[assignment]
    transposed.is_transposed = True  # type: ignore[assignment]
    ungated.has_gate = False  # type: ignore[assignment]
    for experts in (interleaved, transposed, ungated):
        with pytest.raises(ValueError, match="Experts does not fit the layer"):
            read_structure(experts)


def test_a_module_without_stacked_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="ModuleList does not fit the layer: it has no down_proj, up_proj, only"):
        read_structure(nn.ModuleList([nn.Linear(4, 4)]))
