"""Reads a checkpoint in DeepSeek-V4's own format, tensor by tensor, checking each before a byte of it is read.

Names and layout: facts of the published checkpoints. Experts `layers.N.ffn.experts.E.w{1,2,3}.{weight,scale}` (w1
gate, w3 up, w2 down), two E2M1 values a byte (I8, U8 or F4) and a scale per 32 (F8_E8M0 or U8); the shared expert FP8
E4M3 with one scale per 128 x 128; `layers.N.ffn.gate.weight` with `.bias` (scored layers) or `.tid2eid` (hash-routed
layers).
"""

# E experts   H hidden   I intermediate   V vocabulary   K experts per token

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.formats import BLOCK, MXFP4, dequantize_e4m3_blocks
from megamoe.model.deepseek_v4.config import DeepSeekV4Config
from megamoe.model.loading.files import TensorFiles
from megamoe.model.loading.stored import check_values
from megamoe.paths import AnyPath, lasting_path_of

FP8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class E4M3Blocks:
    """values [N, K] float8_e4m3fn and one UE8M0 scale per 128 x 128 of them, uint8: DeepSeek's dense weights."""

    values: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """[N, K] bfloat16, exact"""
        return dequantize_e4m3_blocks(self.values, self.scales, FP8_BLOCK)


class Checkpoint:
    """An open checkpoint, read by range where asked. Use Checkpoint.open()."""

    def __init__(self, files: TensorFiles, config: DeepSeekV4Config) -> None:
        self.path, self.config, self._files = files.path, config, files

    @classmethod
    @contextmanager
    def open(cls, path: AnyPath) -> Iterator[Checkpoint]:
        """Opens config.json and the safetensors shards under path, and closes them on the way out.

        ValueError for a folder that is no such checkpoint, a shard that is missing or truncated.
        """
        path = lasting_path_of(path)
        config = DeepSeekV4Config.read(path)
        with TensorFiles.open(path) as files:
            yield cls(files, config)

    @property
    def bytes_read(self) -> int:
        return self._files.bytes_read

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
        return self.tensor(f"layers.{layer}.ffn.gate.weight", size, "BF16")

    def gate_bias(self, layer: int) -> Tensor:
        """[E] float32, of a scored layer"""
        return self.tensor(f"layers.{layer}.ffn.gate.bias", (self.config.n_routed_experts,), "F32")

    def gate_table(self, layer: int) -> Tensor:
        """tid2eid [V, K] int32, of a hash-routed layer. ValueError for ids outside of [0, E)."""
        name = f"layers.{layer}.ffn.gate.tid2eid"
        table = self.tensor(name, (self.config.vocab_size, self.config.num_experts_per_tok), "I32", "I64")
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= self.config.n_routed_experts:
            raise ValueError(
                f"{self.path}: {name} holds expert ids {low} to {high}, expected [0, {self.config.n_routed_experts})"
            )
        return table

    def norm(self, layer: int) -> Tensor:
        """[H] weight of the normalisation before the expert layer."""
        return self.tensor(f"layers.{layer}.ffn_norm.weight", (self.config.hidden_size,), "BF16", "F32")

    def embedding(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, H] bfloat16; only the rows asked for are read, each once."""
        self._check("embed.weight", (self.config.vocab_size, self.config.hidden_size), "BF16")
        entry = self._files.entries["embed.weight"]
        unique, where = torch.unique(token_ids, return_inverse=True)
        rows = torch.empty(len(unique), self.config.hidden_size, dtype=torch.bfloat16, device="cpu")
        for row, token in zip(rows, unique.tolist(), strict=True):
            self._files.read(entry, row.unsqueeze(0), first=token, count=1)
        check_values(rows, f"{self.path}: embed.weight")
        return rows[where]

    def tensor(self, name: str, shape: Sequence[int], *dtypes: str) -> Tensor:
        """One tensor by name. F4: shape in bytes.

        ValueError where it is missing, has another shape or dtype than expected, or values that are NaN or infinite.
        """
        found = self._read(name, shape, *dtypes)
        check_values(found, f"{self.path}: {name}")
        return found

    def _read(self, name: str, shape: Sequence[int], *dtypes: str) -> Tensor:
        self._check(name, shape, *dtypes)
        return self._files.read(self._files.entries[name])

    def _check(self, name: str, shape: Sequence[int], *dtypes: str) -> None:
        entry = self._files.entries.get(name)
        if entry is None:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        if entry.dtype not in dtypes:
            raise ValueError(f"{self.path}: {name} has dtype {entry.dtype}, expected {' or '.join(dtypes)}")
        if entry.shape != tuple(shape):
            raise ValueError(f"{self.path}: {name} has shape {list(entry.shape)}, expected {list(shape)}")

    def _mxfp4(self, name: str, rows: int, columns: int) -> MXFP4:
        packed = self._read(f"{name}.weight", (rows, columns // 2), "I8", "U8", "F4")
        scales = self._read(f"{name}.scale", (rows, columns // BLOCK), "F8_E8M0", "U8")
        return MXFP4.from_bytes(packed, scales)

    def _fp8(self, name: str, rows: int, columns: int) -> E4M3Blocks:
        values = self.tensor(f"{name}.weight", (rows, columns), "F8_E4M3")
        blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        scales = self.tensor(f"{name}.scale", blocks, "F8_E8M0")
        return E4M3Blocks(values, scales.view(torch.uint8))
