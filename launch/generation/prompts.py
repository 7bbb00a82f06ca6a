"""Prompts as they are given, and as tokens: texts or conversations, through a model's tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.model.generation.request import Prompt

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Given:
    """A prompt's id, and its text or the messages of a conversation."""

    id: str
    text: str | tuple[Message, ...]


def read_prompts(path: Path) -> list[Given]:
    """A file with a JSON object a line: "text", or "messages" with role and content; "id" is the line's number without.

    ValueError, with the line, for a file that cannot be read, is empty, or has anything else.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as missing:
        raise ValueError(f"prompts {path} cannot be read: {missing.strerror}") from missing
    except UnicodeDecodeError as binary:
        raise ValueError(f"prompts {path} is not UTF-8: {binary.reason} at byte {binary.start}") from binary
    found = [_prompt(f"{path}, line {number}", number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f'prompts {path} is empty: give a line of JSON for each, such as {{"text": "Hello"}}')
    ids = [each.id for each in found]
    twice = [each for each in ids if ids.count(each) > 1]
    if twice:
        raise ValueError(f"prompts {path} has the id {twice[0]} twice")
    return found


def _prompt(where: str, number: int, line: str) -> Given:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as wrong:
        raise ValueError(f"{where} is no JSON: {wrong.msg} at column {wrong.colno}") from wrong
    text = entry.get("text") if isinstance(entry, dict) else None
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if isinstance(text, str) and text and messages is None:
        return Given(str(entry.get("id", number)), text)
    if text is None and isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return Given(str(entry.get("id", number)), tuple(messages))
    raise ValueError(f'{where} must have a "text" that is not empty, or "messages" with "role" and "content"')


def _is_message(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in ("role", "content"))


def encode(given: Sequence[Given], tokenizer: Any, *, raw: bool = False) -> tuple[Prompt, ...]:
    """Token ids, through the chat template where the tokenizer has one, unless raw. ValueError for messages without."""
    return tuple(Prompt(each.id, tuple(_token_ids(each, tokenizer, raw))) for each in given)


def _token_ids(given: Given, tokenizer: Any, raw: bool) -> list[int]:
    template = None if raw else getattr(tokenizer, "chat_template", None)
    if template is None:
        if not isinstance(given.text, str):
            raise ValueError(f"prompt {given.id} is a conversation, and the model's tokenizer has no chat template")
        return list(tokenizer(given.text)["input_ids"])
    messages = [{"role": "user", "content": given.text}] if isinstance(given.text, str) else list(given.text)
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


class TextStream:
    """Texts in the order of their prompts, as their tokens come: what is later in order waits until it is its turn."""

    def __init__(self, tokenizer: Any, count: int) -> None:
        self._tokenizer = tokenizer
        self._ids: list[list[int]] = [[] for _ in range(count)]
        self._shown = [0] * count
        self._done = [False] * count
        self._next = 0

    def add(self, prompt: int, tokens: Sequence[int], done: bool) -> list[tuple[int, str, bool]]:
        """More tokens of a prompt -> what can be shown now: prompt, more of its text, whether that is all."""
        self._ids[prompt] += tokens
        self._done[prompt] |= done
        shown = []
        while self._next < len(self._ids):
            number = self._next
            text, done = self.text(number), self._done[number]
            whole = len(text) if done else _complete(text)
            if whole > self._shown[number] or done:
                shown.append((number, text[self._shown[number] : whole], done))
                self._shown[number] = max(whole, self._shown[number])
            if not done:
                break
            self._next += 1
        return shown

    def text(self, prompt: int) -> str:
        """All of a prompt's text so far."""
        return str(self._tokenizer.decode(self._ids[prompt], skip_special_tokens=True))


def _complete(text: str) -> int:
    """How much of a text has all the bytes of its last letter."""
    return len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
