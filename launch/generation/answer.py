"""The demo's end: a question, answered on all ranks and on one, by a model that is made for it and kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from megamoe.launch.cluster.generation import GenerationJob
from megamoe.launch.generation.generate import GenerateRequest, tokens_of
from megamoe.launch.generation.prompts import Given
from megamoe.launch.generation.ranks import OnCluster, Texts, UnderTorchrun
from megamoe.model.loading.load import load_tokenizer
from megamoe.model.making.files import one_maker
from megamoe.model.making.tiny import write_tiny
from megamoe.model.making.upcycle import INSTALL, can_write_english, find_smollm2, key_of, upcycle
from megamoe.schedule.kept import user_cache

Progress = Callable[[str, int, int], None]
_COPIES = {"experts_format": "mxfp4", "num_experts": 8, "topk": 2, "seed": 0}
_VERSION = 1  # of what upcycle() makes of the same file
_NEW_TOKENS = 48


@dataclass(frozen=True, slots=True)
class AnswerReport:
    """model: what answered, in words; path: where it is kept, "" where it was not."""

    question: str
    text: str
    model: str
    path: str
    new_tokens: int
    tokens_per_s: float
    one_rank_tokens_per_s: float
    identical: bool


@contextmanager
def model_for_answers(progress: Progress) -> Iterator[tuple[Path, str, bool]]:
    """A checkpoint, what it is in words, and whether it stays: of SmolLM2 if that is here, else a tiny random one."""
    if not can_write_english():
        with tempfile.TemporaryDirectory(prefix="megamoe-demo-tiny-") as place:
            write_tiny(Path(place) / "mixtral", "mixtral")
            yield Path(place) / "mixtral", f"a tiny random model; for one that writes English: {INSTALL}", False
        return
    source = find_smollm2()
    assert source is not None
    path = user_cache() / key_of(source, version=_VERSION, **_COPIES)
    if not path.exists():
        _make(source, path, progress)
    yield path, f"{source.stem} as {_COPIES['num_experts']} experts a layer, all copies of its MLP, in MXFP4", True


def _make(source: Path, path: Path, progress: Progress) -> None:
    """The model, unless another demo makes it at this moment: then when that is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_maker(path, lambda: progress("waiting for the model, which another process makes", 0, 1)):
        if path.exists():
            return
        try:
            upcycle(source, path, progress=progress, **_COPIES)  # type: ignore[arg-type]
        except ValueError:
            if not path.exists():  # nobody else has made it either
                raise


class Answering:
    """One question to one model, as often as it is asked."""

    def __init__(self, question: str, path: Path) -> None:
        self.question, self.path = question, path
        self._tokenizer: Any = load_tokenizer(path)
        asked = GenerateRequest(path, (Given("1", question),), max_new_tokens=_NEW_TOKENS)
        self._request = tokens_of(asked, self._tokenizer)

    def on(self, ranks: OnCluster | UnderTorchrun) -> Texts:
        texts = Texts(self._request, lambda _: None)
        ranks.generate(GenerationJob(uuid4().hex, self.path, self._request), texts)
        return texts

    def report(self, together: Texts, alone: Texts, model: str, kept: bool) -> AnswerReport:
        return AnswerReport(
            question=self.question,
            text=str(self._tokenizer.decode(together.token_ids(0), skip_special_tokens=True)).strip(),
            model=model,
            path=str(self.path) if kept else "",
            new_tokens=together.new_tokens,
            tokens_per_s=together.tokens_per_s,
            one_rank_tokens_per_s=alone.tokens_per_s,
            identical=together.tokens == alone.tokens,
        )
