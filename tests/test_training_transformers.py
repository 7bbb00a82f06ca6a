"""transformers.Trainer with the plug-in, unmodified: experts that train where transformers has their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.trainer_callback import PrinterCallback

from megamoe.launch.ranks import LocalRanks
from megamoe.model import PackedExpertsConfig, packed_config
from megamoe.model.making.tiny import VOCABULARY, write_tiny
from megamoe.model.training.stock import TrainedExperts
from megamoe.parallel.group import EPGroup
from megamoe.reference import relative_error

LENGTH, BATCH = 24, 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in ("qwen3-moe", "mixtral", "gpt-oss"):
        made[family] = tmp_path_factory.mktemp(family) / "checkpoint"
        write_tiny(made[family], family, num_experts=4, topk=2)
    return made


@contextmanager
def as_launched(group: EPGroup) -> Iterator[None]:
    """The environment that a launcher would give accelerate, which keeps what it finds in globals."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK"):
            patch.setenv(name, str(group.rank))
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.setenv(name, str(group.size))
        patch.setenv("OMP_NUM_THREADS", "1")
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        try:
            yield
        finally:
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()


def load(path: Path, group: EPGroup, layout: str = "fsdp", **options: Any) -> PreTrainedModel:
    options = {"dtype": torch.float32} | options
    if group.size == 1:
        options["experts_implementation"] = "megamoe"
    else:
        sizes = {f"{layout}_size": group.size, "ep_size": group.size}
        options["distributed_config"] = DistributedConfig(**sizes, ep_implementation="megamoe")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **options)
    return model


def texts(num: int) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(3)
    found = []
    for _ in range(num):
        ids = torch.randint(3, VOCABULARY, (1, 4), generator=rng).repeat(1, LENGTH // 4)[0]
        found.append({"input_ids": ids, "labels": ids})
    return found


@dataclass
class Run:
    """losses as logged; packed: how often each layer's weights were; weights of all experts, by name"""

    losses: list[float]
    packed: set[int]
    weights: dict[str, Tensor]


def fit(group: EPGroup, path: Path, steps: int, folder: Path, options: dict[str, Any], only: str = "") -> Run:
    """A Trainer's logged losses over `steps`, BATCH texts a step whatever the number of ranks."""
    with as_launched(group):
        model = load(path, group)
        for name, each in model.named_parameters():
            each.requires_grad = only in name
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH // group.size,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=texts(40))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logged = [each for each in trainer.state.log_history if "loss" in each]
        return Run(
            [each["loss"] for each in logged],
            packings(model),
            {name: whole(each) for name, each in model.named_parameters() if ".experts." in name},
        )


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def packings(model: nn.Module) -> set[int]:
    """How often the weights of each layer were packed."""
    return {each.routed.layer.experts.rounding_step for each in trained(model)}


def trained(model: nn.Module) -> list[TrainedExperts]:
    found = []
    for module in model.modules():
        implementation = getattr(module, "trained", None)
        if isinstance(implementation, TrainedExperts):
            found.append(implementation)
    return found


def test_fifty_steps_of_a_trainer_train_experts_to_the_same_bits(
    checkpoints: dict[str, Path], ranks: LocalRanks, tmp_path: Path
) -> None:
    """Dense weights are frozen, whose gradients transformers sums over ranks in another order than on one."""
    args = checkpoints["qwen3-moe"], 50, tmp_path, {"max_grad_norm": 0.0}, "experts"
    (alone,) = ranks.run(fit, *args, size=1, timeout_s=250.0)
    assert len(alone.losses) == 50
    assert max(alone.losses[-5:]) < 0.2 * alone.losses[0]
    for found in ranks.run(fit, *args, size=2, timeout_s=250.0):
        assert found.packed == alone.packed == {50}
        assert all(torch.equal(found.weights[name], each) for name, each in alone.weights.items())
        # a loss is the mean of two ranks' or of one's, the same but for its last bit
        assert found.losses == pytest.approx(alone.losses, rel=3e-7)
        assert [f"{loss:.4g}" for loss in found.losses] == [f"{loss:.4g}" for loss in alone.losses]


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_whole_models_train_alike_on_one_rank_and_two(
    checkpoints: dict[str, Path], ranks: LocalRanks, tmp_path: Path, family: str
) -> None:
    """With clipping, accumulation and activation checkpoints; dense gradients are not the same to the bit."""
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    args = checkpoints[family], 6, tmp_path, options
    (alone,) = ranks.run(fit, *args, size=1, timeout_s=250.0)
    for found in ranks.run(fit, *args, size=2, timeout_s=250.0):
        assert found.packed == alone.packed == {6}
        assert found.losses == pytest.approx(alone.losses, rel=5e-3)
        assert found.losses[0] == pytest.approx(alone.losses[0], rel=1e-6)


def shared_batch(group: EPGroup, path: Path) -> dict[str, Tensor]:
    """Gradients of all experts where ranks share a batch: dense weights are cut, and each rank computes a slice."""
    model = load(path, group, "tp").train()
    batch = torch.stack([each["input_ids"] for each in texts(3)])
    model(input_ids=batch, labels=batch).loss.backward()
    return {name: whole(each.grad) for name, each in model.named_parameters() if ".experts." in name}


def test_ranks_that_share_a_batch_have_the_gradients_of_one(checkpoints: dict[str, Path], ranks: LocalRanks) -> None:
    (expected,) = ranks.run(shared_batch, checkpoints["mixtral"], size=1)
    for found in ranks.run(shared_batch, checkpoints["mixtral"], size=2):
        assert all(relative_error(found[name], each) < 1e-2 for name, each in expected.items())


def changed_in_place(group: EPGroup, path: Path, layout: str) -> tuple[int, int, bool]:
    """How often weights were packed: in three calls without a change, and after one; whether the output changed."""
    model = load(path, group, layout).train()
    batch = torch.stack([each["input_ids"] for each in texts(2)])
    with torch.no_grad():
        first = [model(input_ids=batch).logits for _ in range(3)][-1]
        (before,) = packings(model)
        for name, each in model.named_parameters():
            if name.endswith(".experts.down_proj"):
                each.mul_(1.5)
        second = model(input_ids=batch).logits
    (after,) = packings(model)
    return before, after, bool((whole(first) != whole(second)).any())


@pytest.mark.parametrize(("layout", "size"), [("fsdp", 1), ("fsdp", 2), ("tp", 2)], ids=["alone", "fsdp", "tp"])
def test_weights_that_are_changed_between_calls_are_packed_again_and_no_others(
    checkpoints: dict[str, Path], ranks: LocalRanks, layout: str, size: int
) -> None:
    assert ranks.run(changed_in_place, checkpoints["mixtral"], layout, size=size) == [(1, 2, True)] * size


# ---- one rank, beside transformers' own experts ----


def gradients(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.train()(hidden, ids, weights).backward(hidden.detach().flip(0))
    found = {name: each.grad for name, each in experts.named_parameters()} | {"x": hidden.grad, "w": weights.grad}
    return {name: each for name, each in found.items() if each is not None}


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "gpt-oss"])
def test_gradients_are_close_to_transformers_own(checkpoints: dict[str, Path], family: str) -> None:
    """gpt-oss: interleaved, transposed, with biases."""
    config, found = AutoConfig.from_pretrained(checkpoints[family]), []
    for each in ("megamoe", "eager"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation=each)
        experts = model.get_submodule("model.layers.0.mlp.experts")
        rng = torch.Generator().manual_seed(3)
        hidden = torch.randn(30, model.config.hidden_size, generator=rng).to(torch.bfloat16).float()
        ids = torch.rand(30, 4, generator=rng).argsort(-1)[:, :2]
        found.append(gradients(experts, hidden, ids, torch.rand(30, 2, generator=rng)))
    assert found[0].keys() == found[1].keys()
    errors = {name: relative_error(each, found[1][name]) for name, each in found[0].items()}
    assert len(errors) == (6 if family == "gpt-oss" else 4)
    assert max(errors.values()) < 0.02, errors


def test_experts_train_in_fp4_where_the_checkpoint_is_quantised(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """PackedExpertsConfig() on a BF16 checkpoint: masters stay, and each step's forward has them in MXFP4."""
    model = load_fp4(checkpoints["mixtral"])
    Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))  # takes it
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        batch = torch.stack([each["input_ids"] for each in texts(3)])
        loss = model.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert {each.routed.layer.weight_format for each in trained(model)} == {"mxfp4"}
    assert packings(model) == {8}
    changed = [name for name, each in model.named_parameters() if not torch.equal(each, before[name])]
    assert sum(".experts." in name for name in changed) == 2 * len(trained(model))
    with torch.no_grad():
        expected = model.eval()(input_ids=batch).logits
    model.save_pretrained(tmp_path / "saved")  # the weights are the module's, also after a call in eval mode
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", experts_implementation="megamoe")
    with torch.no_grad():
        assert torch.equal(saved(input_ids=batch).logits, expected)


def load_fp4(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=PackedExpertsConfig(), experts_implementation="megamoe"
    )
    return model


def test_what_cannot_train_says_why(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["mixtral"]
    batch = texts(1)[0]["input_ids"][None]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="megamoe")
    with torch.no_grad():
        model(batch)
    with pytest.raises(ValueError, match="since the model's first call was in eval mode: load the model again"):
        model.train()(batch)
    half = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, experts_implementation="megamoe")
    with pytest.raises(ValueError, match=r"must be torch.float32 or torch.bfloat16 to be trained, got torch.float16"):
        half.train()(batch)
    packed = AutoModelForCausalLM.from_pretrained(
        checkpoints["gpt-oss"], config=packed_config(checkpoints["gpt-oss"]), dtype=torch.bfloat16
    )
    with pytest.raises(ValueError, match="are packed as the checkpoint has them and cannot be trained"):
        packed.train()(batch)
    tuned = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="megamoe")
    tuned.train()(batch)
    register_parametrization(tuned.get_submodule("model.layers.0.mlp.experts"), "gate_up_proj", nn.Identity())
    with pytest.raises(ValueError, match="MixtralExperts has a parametrization of gate_up_proj: the layer multiplies"):
        tuned(batch)
