"""Whole models that train: experts of transformers models, balance, gradients of dense weights, saving in FP4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.model.loading.load import load
from megamoe.model.making.tiny import FAMILIES
from megamoe.model.quantizer import packed_config
from megamoe.model.training.experts import dense_parameters, make_trainable
from megamoe.model.training.save import save_native
from megamoe.parallel.errors import CallRefusedError, PeerError
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE, sum_gradients, sum_over_ranks, update_bias
from tests.cases import make_batch, split
from tests.moe_blocks import routed_experts
from tests.training_cases import make_trainable as make_layer

SHAPE = MoEShape(hidden=64, intermediate=64, num_experts=6, topk=2)
BATCH = make_batch(SHAPE, 37)
TOKENS = torch.tensor([[1, 5, 9, 2, 7, 3, 8, 4, 6, 1, 2, 11]])


# ---- balance ----


def test_a_bias_moves_by_the_sign_of_its_experts_load() -> None:
    bias = torch.tensor([0.5, 0.5, 0.5])
    update_bias(bias, torch.tensor([5, 1, 3]), rate=0.25)
    assert bias.tolist() == [0.25, 0.75, 0.5]


def test_loads_even_out() -> None:
    scores = torch.rand(512, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 1, 8)
    bias = torch.zeros(8)

    def loads() -> Tensor:
        return torch.bincount((scores + bias).topk(2).indices.flatten(), minlength=8)

    assert int(loads().max()) > 2.5 * 512 * 2 / 8
    for _ in range(300):
        update_bias(bias, loads(), rate=0.01)
    assert int(loads().max()) < 1.2 * 512 * 2 / 8


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (torch.ones(2, dtype=torch.int64), r"\[3\] and \[2\]"),
        (torch.ones(3), "counts, of an integer dtype, got torch.float"),
    ],
)
def test_what_is_no_load_is_refused(counts: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        update_bias(torch.zeros(3), counts)


def loads_of_calls(group: EPGroup) -> list[Tensor]:
    mine = split(len(BATCH.hidden), group.size, empty=1 if group.size > 1 else None)[group.rank]
    batch, layer, found = BATCH.part(mine), make_layer(SHAPE, group), []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            layer(batch.hidden, batch.ids, batch.weights)
        found.append(layer.tokens_per_expert)
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_knows_the_load_of_all(ranks: LocalRanks, size: int) -> None:
    expected = torch.bincount(BATCH.ids[BATCH.ids >= 0], minlength=SHAPE.num_experts)
    for found in ranks.run(loads_of_calls, size=size):
        assert all(torch.equal(each, expected) for each in found)


# ---- dense gradients ----


def gradient_of(rank: int, number: int) -> Tensor:
    return torch.randn(1 << 18, generator=torch.Generator().manual_seed(10 * rank + number)).view(2, -1)


def summed(group: EPGroup) -> list[Tensor]:
    """Six parameters, more than a bucket: rank 1 has no gradient of the first, the last is frozen, one is bfloat16."""
    made = [nn.Parameter(torch.zeros(2, 1 << 17)) for _ in range(5)] + [
        nn.Parameter(torch.zeros(2), requires_grad=False)
    ]
    made[2] = nn.Parameter(made[2].data.to(torch.bfloat16))
    for number, each in enumerate(made[:5]):
        if (group.rank, number) != (1, 0):
            each.grad = gradient_of(group.rank, number).to(each.dtype)
    sum_gradients(made, group)
    assert made[5].grad is None
    return [each.grad for each in made[:5] if each.grad is not None]


def test_gradients_are_summed_in_order_of_rank(ranks: LocalRanks) -> None:
    found = ranks.run(summed, size=3)
    for number in range(5):
        dtype = torch.bfloat16 if number == 2 else torch.float32
        parts = [gradient_of(rank, number).to(dtype).to(torch.float32) for rank in range(3)]
        if number == 0:
            parts[1].zero_()
        expected = ((parts[0] + parts[1]) + parts[2]).to(dtype)
        assert all(torch.equal(each[number], expected) for each in found), number


def test_a_rank_alone_keeps_its_gradients() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    sum_gradients([parameter], EPGroup.of(None))
    assert parameter.grad is None
    assert sum_over_ranks(torch.tensor(2), EPGroup.of(None)).item() == 2


def differing(group: EPGroup) -> float:
    parameter = nn.Parameter(torch.zeros(3 + (group.rank == 2)))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(CallRefusedError, match="rank 2 sums 4 values in 1 tensors, rank 0 3 in 1"):
        sum_gradients([parameter], group)
    assert parameter.grad.tolist() == [1.0] * len(parameter)
    return float(sum_over_ranks(torch.tensor(group.rank + 0.5, dtype=torch.float64), group))


def test_ranks_that_bring_other_sizes_refuse_and_go_on(ranks: LocalRanks) -> None:
    assert ranks.run(differing, size=3) == [4.5] * 3


def one_raises(group: EPGroup) -> None:
    if group.rank == 1:
        raise KeyError("boom")
    parameter = nn.Parameter(torch.zeros(3))
    sum_gradients([parameter], group)


def test_a_rank_that_is_lost_is_named(ranks: LocalRanks) -> None:
    first, lost, third = ranks.outcomes(one_raises, size=3)
    assert isinstance(lost, KeyError)
    for each in (first, third):
        assert isinstance(each, PeerError)
        assert (each.rank, each.condition) == (1, "raised")
        assert each.phase in ("begin", "sum")  # as it raised before or while they looked for it


# ---- what is saved ----


def test_a_layer_of_inference_takes_what_training_multiplies_by() -> None:
    sweep: dict[str, dict[str, Any]] = {"mxfp4": {"rounding": "stochastic"}, "bf16": {"dispatch_format": "bf16"}}
    for weight_format, options in sweep.items():
        trained = make_layer(SHAPE, weight_format=weight_format, **options)
        with torch.no_grad():
            trained.experts.down.mul_(1.3)
            plain = MegaMoE(SHAPE, weight_format=weight_format, dispatch_format=trained.dispatch_format)
            plain.load_state_dict(trained.inference_state_dict())
            given = BATCH.hidden, BATCH.ids, BATCH.weights
            assert torch.equal(plain(*given), trained(*given)), weight_format


def tiny_model(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(FAMILIES[family][0](16, 2), dtype=torch.float32)


def trained_a_step(family: str, group: EPGroup, **options: Any) -> tuple[Any, dict[str, TrainableMoE]]:
    model = tiny_model(family)
    layers = make_trainable(model, group, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    sum_gradients((each for _, each in dense_parameters(model)), group)
    optimizer.step()
    return model.eval(), layers


def saved(
    group: EPGroup, family: str, path: Path, options: dict[str, Any]
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    model, layers = trained_a_step(family, group, **options)
    save_native(model, path, group)
    with torch.no_grad():
        logits = model(input_ids=TOKENS, use_cache=False).logits
    return logits, {name: layer.inference_state_dict() for name, layer in layers.items()}


@pytest.mark.parametrize(
    ("family", "size", "options"),
    [
        ("deepseek-v4-flash", 3, {}),
        ("mixtral", 2, {"rounding": "stochastic"}),
        ("qwen3-moe", 1, {"weight_format": "bf16", "dispatch_format": "bf16"}),
        ("deepseek-v3", 2, {}),
    ],
    ids=["deepseek-v4-ep3", "mixtral-ep2-stochastic", "qwen3-bf16", "deepseek-v3-ep2"],
)
def test_what_is_saved_is_what_training_multiplied_by(
    ranks: LocalRanks, tmp_path: Path, family: str, size: int, options: dict[str, Any]
) -> None:
    path = tmp_path / "saved"
    outputs = ranks.run(saved, family, path, options, size=size)
    model = load(path)
    assert model.megamoe_report.unused == ()
    assert set(model.megamoe_report.weight_formats.values()) == {options.get("weight_format", "mxfp4")}
    assert model.megamoe_report.quantization_error == {}
    for name, routed in routed_experts(model).items():
        held = routed.layer.state_dict()
        trained = [states[name] for _, states in outputs]
        whole = {key: torch.cat([each[key] for each in trained]) for key in held if not key.endswith("held")}
        again = MegaMoE(
            routed.layer.shape, weight_format=routed.layer.weight_format, dispatch_format=routed.layer.dispatch_format
        )
        again.load_state_dict({**whole, "experts.held": held["experts.held"]})
        hidden = torch.randn(9, routed.layer.shape.hidden, generator=torch.Generator().manual_seed(1)).to(
            torch.bfloat16
        )
        ids = torch.arange(18).view(9, 2) % 16
        weights = torch.full((9, 2), 0.5)
        assert torch.equal(again(hidden, ids, weights), routed.layer(hidden, ids, weights)), name
    with torch.no_grad():
        logits = model(input_ids=TOKENS, use_cache=False).logits
    for trained_logits, _ in outputs:
        assert float((logits - trained_logits).norm() / trained_logits.norm()) < 2e-2
    assert [each.name for each in tmp_path.iterdir()] == ["saved"]


def test_transformers_reads_what_is_saved_of_deepseek_v4(tmp_path: Path) -> None:
    saved(EPGroup.of(None), "deepseek-v4-flash", tmp_path / "saved", {})
    config = packed_config(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", config=config)
    with torch.no_grad():
        logits = [each(input_ids=TOKENS, use_cache=False).logits for each in (theirs, load(tmp_path / "saved"))]
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 1e-4


def refused(group: EPGroup, path: Path) -> list[str]:
    model, _ = trained_a_step("mixtral", group)
    found = []
    for place in (path, path / "mine" / "new"):
        with pytest.raises(ValueError, match=r"there already|cannot be written") as refusal:
            save_native(model, place, group)
        found.append(str(refusal.value))
    return found


def test_a_folder_that_is_taken_or_cannot_be_is_refused_on_every_rank(ranks: LocalRanks, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    first, second = ranks.run(refused, tmp_path, size=2)
    assert first[0] == f"{tmp_path} is there already: give a folder that is new"
    assert first[1] == f"{tmp_path / 'mine' / '.new-partial'} cannot be written: Not a directory"
    assert second == [f"rank 0: {each}" for each in first]
    assert [each.name for each in tmp_path.iterdir()] == ["mine"]


def test_models_that_cannot_be_trained_or_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Linear has no routed experts"):
        make_trainable(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="MixtralForCausalLM has no experts that train: make_trainable"):
        save_native(tiny_model("mixtral"), tmp_path / "new")
    model = tiny_model("gpt-oss")
    make_trainable(model)
    with pytest.raises(ValueError, match=r"keeps .*gate_up_proj of all experts in one tensor"):
        save_native(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())
