"""Reads a checkpoint in DeepSeek-V4's own format, tensor by tensor, checking each before a byte of it is read.

Names and layout: facts of the published checkpoints. Experts `layers.N.ffn.experts.E.w{1,2,3}.{weight,scale}` (w1
gate, w3 up, w2 down), two E2M1 values a byte (I8, U8 or F4) and a scale per 32 (F8_E8M0 or U8); the shared expert FP8
E4M3 with one scale per 128 x 128; `layers.N.ffn.gate.weight` with `.bias` (scored layers) or `.tid2eid` (hash-routed
layers).
"""

# E experts   H hidden   I intermediate   V vocabulary   K experts per token

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamoe.formats import BLOCK, MXFP4, dequantize_e4m3_blocks
from megamoe.model.deepseek_v4.config import DeepSeekV4Config

FP8_BLOCK = 128
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class E4M3Blocks:
    """values [N, K] float8_e4m3fn and one UE8M0 scale per 128 x 128 of them, uint8: DeepSeek's dense weights."""

    values: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """[N, K] bfloat16, exact"""
        return dequantize_e4m3_blocks(self.values, self.scales, FP8_BLOCK)


class Checkpoint:
    """An open checkpoint: one file per shard, mapped, and read where asked. Use Checkpoint.open()."""

    def __init__(self, path: Path, config: DeepSeekV4Config, files: dict[str, Any], where: dict[str, str]) -> None:
        self.path, self.config = path, config
        self.bytes_read = 0
        self._files, self._where = files, where

    @classmethod
    @contextmanager
    def open(cls, path: str | Path) -> Iterator[Checkpoint]:
        """Opens config.json and the safetensors shards under path, and closes them on the way out.

        ValueError for a folder that is no such checkpoint, a shard that is missing or truncated.
        """
        path = Path(path)
        config = DeepSeekV4Config.read(path)
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            where: dict[str, str] = {}
            for shard in _shards(path):
                try:
                    files[shard] = stack.enter_context(safe_open(path / shard, framework="pt"))
                except (SafetensorError, OSError) as broken:
                    raise ValueError(f"{path / shard} cannot be read, it may be truncated: {broken}") from broken
                where |= dict.fromkeys(files[shard].keys(), shard)
            yield cls(path, config, files, where)

    def expert(self, layer: int, expert: int) -> tuple[MXFP4, MXFP4]:
        """gate_up [2I, H] (gate rows first) and down [H, I] of one expert."""
        hidden, inner = self.config.hidden_size, self.config.moe_intermediate_size
        gate = self._mxfp4(f"layers.{layer}.ffn.experts.{expert}.w1", inner, hidden)
        up = self._mxfp4(f"layers.{layer}.ffn.experts.{expert}.w3", inner, hidden)
        down = self._mxfp4(f"layers.{layer}.ffn.experts.{expert}.w2", hidden, inner)
        return MXFP4(torch.cat((gate.packed, up.packed)), torch.cat((gate.scales, up.scales))), down

    def shared_expert(self, layer: int) -> tuple[E4M3Blocks, E4M3Blocks, E4M3Blocks]:
        """gate [I, H], up [I, H] and down [H, I] of the shared expert, as they are stored."""
        hidden, inner = self.config.hidden_size, self.config.moe_intermediate_size
        name = f"layers.{layer}.ffn.shared_experts"
        gate, up = self._fp8(f"{name}.w1", inner, hidden), self._fp8(f"{name}.w3", inner, hidden)
        return gate, up, self._fp8(f"{name}.w2", hidden, inner)

    def gate_weight(self, layer: int) -> Tensor:
        """[E, H] bfloat16"""
        size = (self.config.n_routed_experts, self.config.hidden_size)
        return self.tensor(f"layers.{layer}.ffn.gate.weight", size, "BF16").clone()

    def gate_bias(self, layer: int) -> Tensor:
        """[E] float32, of a scored layer"""
        return self.tensor(f"layers.{layer}.ffn.gate.bias", (self.config.n_routed_experts,), "F32").clone()

    def gate_table(self, layer: int) -> Tensor:
        """tid2eid [V, K] int32, of a hash-routed layer. ValueError for ids outside of [0, E)."""
        name = f"layers.{layer}.ffn.gate.tid2eid"
        table = self.tensor(name, (self.config.vocab_size, self.config.num_experts_per_tok), "I32", "I64")
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= self.config.n_routed_experts:
            raise ValueError(
                f"{self.path}: {name} holds expert ids {low} to {high}, expected [0, {self.config.n_routed_experts})"
            )
        return table.clone()

    def norm(self, layer: int) -> Tensor:
        """[H] weight of the normalisation before the expert layer."""
        return self.tensor(f"layers.{layer}.ffn_norm.weight", (self.config.hidden_size,), "BF16", "F32").clone()

    def embedding(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, H] bfloat16; only the pages of the rows asked for are read."""
        table = self.tensor("embed.weight", (self.config.vocab_size, self.config.hidden_size), "BF16", count=False)
        rows = table[token_ids]
        self.bytes_read += rows.numel() * rows.element_size()
        return rows

    def tensor(self, name: str, shape: Sequence[int], *dtypes: str, count: bool = True) -> Tensor:
        """One tensor by name, mapped: clone what is kept, or the whole shard stays mapped with it. F4: shape in bytes.

        ValueError where it is missing or has another shape or dtype than expected.
        """
        if name not in self._where:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        file = self._files[self._where[name]]
        view = file.get_slice(name)
        if view.get_dtype() not in dtypes:
            raise ValueError(f"{self.path}: {name} has dtype {view.get_dtype()}, expected {' or '.join(dtypes)}")
        two_a_byte = view.get_dtype() == "F4"  # whose shape counts values
        expected = [*shape[:-1], 2 * shape[-1]] if two_a_byte else list(shape)
        if list(view.get_shape()) != expected:
            raise ValueError(f"{self.path}: {name} has shape {view.get_shape()}, expected {expected}")
        tensor: Tensor = file.get_tensor(name)
        if count:
            self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def _mxfp4(self, name: str, rows: int, columns: int) -> MXFP4:
        packed = self.tensor(f"{name}.weight", (rows, columns // 2), "I8", "U8", "F4")
        scales = self.tensor(f"{name}.scale", (rows, columns // BLOCK), "F8_E8M0", "U8")
        return MXFP4.from_bytes(packed, scales)

    def _fp8(self, name: str, rows: int, columns: int) -> E4M3Blocks:
        values = self.tensor(f"{name}.weight", (rows, columns), "F8_E4M3")
        blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        scales = self.tensor(f"{name}.scale", blocks, "F8_E8M0")
        return E4M3Blocks(values.clone(), scales.view(torch.uint8).clone())


def _shards(path: Path) -> list[str]:
    """File names of the shards: those of the index, or the one file."""
    index = path / INDEX
    if not index.is_file():
        if not (path / "model.safetensors").is_file():
            raise ValueError(f"{path} holds neither {INDEX} nor model.safetensors")
        return ["model.safetensors"]
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as broken:
        raise ValueError(f"{index} has no weight_map that can be read: {broken!r}") from broken
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which its index names")
    return shards
