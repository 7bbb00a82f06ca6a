"""Loading gigabytes of experts on several ranks: bytes, peak memory and time, against a plain read of the same bytes.

    python -m benchmarks.loading [--gb 4] [--ranks 4] [--repeats 3] [--folder DIR]

Two checkpoints are made on the spot, and deleted afterwards: one with a tensor for each matrix of an expert, in BF16
(Qwen3-MoE's names), one with all experts of a layer in one tensor, in MXFP4 (gpt-oss's). The files' pages are dropped
before each load and each plain read, which take turns. Memory is a rank's peak of anonymous and file pages while it
loads, of which what it held before is given beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import above_zero, positive, run
from megamoe.launch.ranks import LocalRanks
from megamoe.model import load
from megamoe.parallel.group import EPGroup
from megamoe.paths import path_of

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 2048, 1024
_AT_ONCE = 8 << 20
_COMMON = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCABULARY,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts_per_tok": 4,
    "dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank did. Bytes; before and peak: of its resident memory."""

    seconds: float
    bytes_read: int
    expert_bytes: int
    dense_bytes: int
    before_bytes: int
    peak_bytes: int


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def prepare(group: EPGroup) -> None:
    """Imports what loading needs, so that a load is timed without it."""
    import transformers.models.gpt_oss.modeling_gpt_oss
    import transformers.models.qwen3_moe.modeling_qwen3_moe

    import megamoe.model.loading.load  # noqa: F401

    assert group.size, transformers


def load_once(group: EPGroup, path: Path) -> RankLoad:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = resident("VmRSS"), time.monotonic()
    model = load(path, group=group)
    seconds, report = time.monotonic() - begun, model.megamoe_report
    return RankLoad(seconds, report.bytes_read, report.expert_bytes, report.dense_bytes, before, resident("VmHWM"))


def read_plainly(path: Path) -> float:
    """Seconds for one process to read all files one after another, 8 MiB at a time."""
    buffer, begun = bytearray(_AT_ONCE), time.monotonic()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.monotonic() - begun


def drop_pages(path: Path) -> None:
    """Has the system forget the files' pages, which are on the disk already."""
    for file in path.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# ---- checkpoints, written a tensor at a time ----


def write(path: Path, config: dict[str, Any], kind: str, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """One file with tensors by name, dtype and shape: BF16 of ordinary size, small scales, any bytes."""
    from transformers import AutoConfig

    AutoConfig.for_model(kind, **_COMMON, **config).save_pretrained(path)
    sizes = {"BF16": 2, "U8": 1}
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + sizes[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = torch.Generator().manual_seed(0)
    values = (torch.randn(_AT_ONCE // 2, generator=rng) * 0.02).to(torch.bfloat16).view(torch.uint8)
    fill = {
        "BF16": values.numpy().data,
        "U8": torch.randint(0, 256, (_AT_ONCE,), dtype=torch.uint8, generator=rng).numpy().data,
        "scales": torch.randint(115, 122, (_AT_ONCE,), dtype=torch.uint8, generator=rng).numpy().data,
    }
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, described in header.items():
            begin, end = described["data_offsets"]
            source = fill["scales" if name.endswith("_scales") else described["dtype"]]
            for start in range(begin, end, _AT_ONCE):
                file.write(source[: min(_AT_ONCE, end - start)])
        file.flush()
        os.fsync(file.fileno())


def dense_of(model: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors outside of experts."""
    return {name: ("BF16", tuple(each.shape)) for name, each in model.state_dict().items() if ".experts." not in name}


def skeleton(config: dict[str, Any], kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_COMMON, **config))


def per_expert_bf16(path: Path, total: float) -> None:
    experts, matrix = 32, HIDDEN * INTERMEDIATE * 2
    layers = max(1, round(total / (3 * experts * matrix) + 0.49))
    config = {
        "num_hidden_layers": layers,
        "num_experts": experts,
        "intermediate_size": INTERMEDIATE,
        "moe_intermediate_size": INTERMEDIATE,
    }
    tensors = dense_of(skeleton(config, "qwen3_moe"))
    for layer in range(layers):
        for expert in range(experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                size = (HIDDEN, INTERMEDIATE) if name == "down_proj" else (INTERMEDIATE, HIDDEN)
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = ("BF16", size)
    write(path, config, "qwen3_moe", tensors)


def fused_mxfp4(path: Path, total: float) -> None:
    experts = 64
    layers = max(1, round(total / (3 * experts * HIDDEN * INTERMEDIATE * 17 / 32) + 0.49))
    config = {
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "intermediate_size": INTERMEDIATE,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    tensors = dense_of(skeleton(config, "gpt_oss"))
    for layer in range(layers):
        for name, outputs, inputs in (("gate_up_proj", 2 * INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)):
            full = f"model.layers.{layer}.mlp.experts.{name}"
            tensors[f"{full}_blocks"] = ("U8", (experts, outputs, inputs // 32, 16))
            tensors[f"{full}_scales"] = ("U8", (experts, outputs, inputs // 32))
            tensors[f"{full}_bias"] = ("BF16", (experts, outputs))
    write(path, config, "gpt_oss", tensors)


KINDS = {"per-expert BF16": per_expert_bf16, "fused MXFP4": fused_mxfp4}


def measure(path: Path, ranks: LocalRanks, repeats: int) -> Iterator[tuple[float, list[RankLoad]]]:
    """Seconds of a plain read and what each rank did, taking turns."""
    for _ in range(repeats):
        drop_pages(path)
        plain = read_plainly(path)
        drop_pages(path)
        yield plain, ranks.run(load_once, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gb", type=above_zero, default=4.0, help="gigabytes of experts in each checkpoint")
    parser.add_argument("--ranks", type=positive, default=4)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--folder", type=path_of, default=None, help="where checkpoints are made; a temporary folder")
    parser.add_argument("--kind", choices=KINDS, default=None, help="one kind alone")
    asked = parser.parse_args(arguments)
    if asked.folder is not None and not asked.folder.is_dir():
        parser.error(f"--folder: there is no folder {asked.folder}")
    folder = Path(tempfile.mkdtemp(prefix="megamoe-loading-", dir=asked.folder))
    try:
        with LocalRanks(asked.ranks, threads_per_rank=1, deadline_s=300.0) as ranks:
            ranks.run(prepare)
            for kind, make in KINDS.items():
                if asked.kind not in (None, kind):
                    continue
                path = folder / kind.replace(" ", "-")
                path.mkdir()
                make(path, asked.gb * 1e9)
                total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
                print(f"{kind}: {total / 1e9:.2f} GB on {asked.ranks} ranks")
                ratios = []
                for plain, loads in measure(path, ranks, asked.repeats):
                    wall = max(each.seconds for each in loads)
                    ratios.append(wall / plain)
                    print(f"  plain read {plain:5.2f} s, load {wall:5.2f} s: {ratios[-1]:.2f} x")
                for rank, each in enumerate(loads):
                    grown = each.peak_bytes - each.before_bytes
                    print(
                        f"  rank {rank}: read {each.bytes_read / 1e9:.2f} GB ({each.expert_bytes / 1e9:.2f} experts, "
                        f"{each.dense_bytes / 1e9:.2f} dense), grew by {grown / 1e9:.2f} GB at its peak, that is "
                        f"{(grown - each.bytes_read) / 1e6:+.0f} MB, from {each.before_bytes / 1e6:.0f} MB"
                    )
                print(f"  median {statistics.median(ratios):.2f} x of a plain read")
                shutil.rmtree(path)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    run(main)
