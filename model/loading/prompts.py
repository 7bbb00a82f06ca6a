"""Prompts through a whole model, each alone, on ranks that keep in step: what a cluster's workers hold and run."""

# T tokens of a prompt   H hidden

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.execution.journeys import CallRecord
from megamoe.model.experts import RoutedExperts
from megamoe.model.loading.load import load, regroup
from megamoe.parallel.group import EPGroup
from megamoe.routing.waves import Waves


class PromptModel:
    """A model that load() made, kept from group to group."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._routed = [module for module in model.modules() if isinstance(module, RoutedExperts)]

    @classmethod
    def load(
        cls, path: Path, group: EPGroup, *, waves: Waves, dispatch_format: str, combine_format: str, device: str
    ) -> PromptModel:
        """As load() has it. With BF16 experts dispatch_format "mxfp8" rounds the tokens."""
        gc.collect()
        options: dict[str, Any] = {"waves": waves, "dispatch_format": dispatch_format, "combine_format": combine_format}
        return cls(load(path, group=group, device=device, **options))

    def regroup(self, group: EPGroup) -> tuple[int, int]:
        """Goes on in another group -> experts that this rank had already, and those that were read."""
        report = regroup(self._model, group)
        return report.experts_kept, report.experts_read

    @property
    def bytes_read(self) -> int:
        """When it was loaded last."""
        return int(self._model.megamoe_report.bytes_read)

    @property
    def num_local_experts(self) -> int:
        return sum(len(each.layer.local_experts) for each in self._routed)

    @property
    def vocab_size(self) -> int:
        return int(self._model.config.get_text_config().vocab_size)

    def forward(self, prompts: Sequence[Sequence[int]], rounds: int) -> tuple[list[Tensor], CallRecord]:
        """Each prompt alone -> the last layer's hidden states [T, H] of each, and what the layers did.

        rounds   the most prompts that any rank has: one that has fewer calls its layers without tokens
        """
        found, record = [], CallRecord()
        with torch.no_grad():
            for number in range(rounds):
                if number < len(prompts):
                    ids = torch.tensor([list(prompts[number])], device=self._model.device)
                    out = self._model.base_model(input_ids=ids, use_cache=False)
                    found.append(out.last_hidden_state[0].cpu())
                else:
                    for each in self._routed:
                        each.idle()
                record = sum((each.layer.last_call for each in self._routed), record)
        return found, record
