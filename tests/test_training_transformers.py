"""transformers.Trainer with the plug-in, unmodified: experts that train where transformers has their weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.distributed import DistributedConfig

from megamoe.launch.ranks import LocalRanks
from megamoe.model import PackedExpertsConfig
from megamoe.model.making.tiny import write_tiny
from megamoe.model.making.tokenizer import VOCABULARY
from megamoe.model.training import TrainedExperts
from megamoe.parallel.group import EPGroup

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
        for name, value in {"RANK": group.rank, "LOCAL_RANK": group.rank, "WORLD_SIZE": group.size}.items():
            patch.setenv(name, str(value))
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
    losses: list[float]
    norms: list[float]
    steps: set[int]


def fit(group: EPGroup, path: Path, steps: int, folder: Path, layout: str = "fsdp", **options: Any) -> Run:
    """A Trainer's logged losses over `steps`, BATCH texts a step whatever the number of ranks."""
    with as_launched(group):
        import time; t=time.time(); c=time.process_time()
        model = load(path, group, layout)
        print("load", time.time()-t, time.process_time()-c)
        shares = group.size if layout == "fsdp" else 1
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH // shares,
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
        import time; t=time.time(); c=time.process_time()
        trainer.train()
        print("train", time.time()-t, time.process_time()-c)
        logged = [each for each in trainer.state.log_history if "loss" in each]
        return Run(
            [each["loss"] for each in logged],
            [float(each["grad_norm"]) for each in logged],
            {each.routed.layer.experts.rounding_step for each in trained(model)},
        )


def trained(model: nn.Module) -> list[TrainedExperts]:
    found = []
    for module in model.modules():
        implementation = getattr(module, "trained", None)
        if isinstance(implementation, TrainedExperts):
            found.append(implementation)
    return found


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_fifty_steps_of_a_trainer(
    checkpoints: dict[str, Path], ranks: LocalRanks, tmp_path: Path, family: str
) -> None:
    (alone,) = ranks.run(fit, checkpoints[family], 50, tmp_path, size=1, timeout_s=250.0)
    found = ranks.run(fit, checkpoints[family], 50, tmp_path, size=2, timeout_s=250.0)
    print(alone, found[0])
    assert alone.losses[-1] < 0.5 * alone.losses[0]
    assert found[0].losses == alone.losses
