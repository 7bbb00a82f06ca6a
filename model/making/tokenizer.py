"""A tokenizer that needs no training: a token for each byte, and three of its own."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
VOCABULARY = 256 + 3
_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Any text in VOCABULARY tokens, and back; with a plain chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable letter for each byte
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in (BEGIN, END, PAD)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD)
    made.chat_template = _CHAT
    assert len(made) == VOCABULARY, len(made)
    return made


def write_tokenizer(path: Path) -> None:
    """Into the folder of a checkpoint."""
    byte_tokenizer().save_pretrained(path)
