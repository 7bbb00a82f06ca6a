"""megamoe generate: texts in order, what it reports, and what it refuses before any rank is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from megamoe.launch.cluster.generation import TokenFiles
from megamoe.launch.generation.answer import Answering, model_for_answers
from megamoe.launch.generation.prompts import Given, TextStream, encode, read_prompts
from megamoe.launch.generation.ranks import OnCluster, Texts
from megamoe.model.generation.request import GenerationRequest, Prompt, Token
from megamoe.model.making.files import new_folder
from megamoe.model.making.tiny import byte_tokenizer, write_tiny
from megamoe.model.making.upcycle import INSTALL
from tests.commands import invoked, refused
from tests.processes import ranks_of
from tests.test_demo import COMMAND


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("generate") / "mixtral"
    write_tiny(path, "mixtral")
    return path


# ---- the command ----


@pytest.fixture(scope="module")
def reports(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same prompts under two launchers, as JSON."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        {"id": "first", "text": "Hello"},
        {"text": "Experts are split into waves."},
        {"id": 7, "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = {}
    for launcher, check in (("spawn", ["--check"]), ("torchrun", [])):
        arguments = ("--model", model, "--prompts", prompts, "--launcher", launcher, "--max-new-tokens", 10, *check)
        done = invoked("generate", *arguments, "--format", "json")
        assert done.exit_code == 0, done.output
        found[launcher] = json.loads(done.stdout)
    return found


def test_json_has_every_text_and_what_it_took(reports: dict[str, dict[str, Any]], model: Path) -> None:
    report = reports["spawn"]
    assert [prompt["id"] for prompt in report["prompts"]] == ["first", "2", "7"]
    tokenizer = byte_tokenizer()
    for prompt in report["prompts"]:
        assert prompt["finish_reason"] in ("stop", "length")
        assert len(prompt["token_ids"]) == 10 or prompt["finish_reason"] == "stop"
        assert tokenizer.decode(prompt["token_ids"], skip_special_tokens=True) == prompt["text"]
    assert (report["ranks"], report["launcher"], report["identical"]) == (2, "spawn", True)
    assert report["model"] == str(model)
    assert report["tokens_per_s"] > 0
    assert report["ttft_ms"] > 0
    assert report["tpot_ms"] > 0
    assert 0 <= report["hidden_percent"] <= 100


def test_torchrun_gives_the_same_texts(reports: dict[str, dict[str, Any]]) -> None:
    assert reports["torchrun"]["prompts"] == reports["spawn"]["prompts"]
    assert reports["torchrun"]["identical"] is None


def test_texts_are_printed_in_order_under_their_prompts(model: Path) -> None:
    arguments = ("--model", model, "--text", "one", "--text", "two", "--max-new-tokens", 4, "--temperature", 1.5)
    done = invoked("generate", *arguments, "--ranks", 1, "--raw", "--check")
    assert done.exit_code == 0, done.output
    assert done.stdout.index("[1] ") < done.stdout.index("[2] ")
    assert " tokens on 1 rank (spawn): " in done.stdout
    assert done.stdout.rstrip().endswith("every token: identical")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give prompts with --text, or a file of them with --prompts"),
        (["--text", "a", "--prompts", "{tmp}/prompts"], "give prompts with --text, or a file of them with --prompts"),
        (["--text", ""], "--text is empty"),
        (["--prompts", "{tmp}/none"], "none cannot be read: No such file"),
        (["--prompts", "{tmp}/empty"], 'empty is empty: give a line of JSON for each, such as {"text": "Hello"}'),
        (["--prompts", "{tmp}/broken"], "broken, line 2 is no JSON: "),
        (["--prompts", "{tmp}/other"], 'other, line 1 must have a "text" that is not empty, or "messages"'),
        (["--prompts", "{tmp}/twice"], "twice has the id a twice"),
        (["--prompts", "{tmp}/binary"], "binary is not UTF-8"),
        (["--text", "a", "--ranks", 0], "ranks must be at least 1, got 0"),
        (["--text", "a", "--max-new-tokens", 0], "max_new_tokens must be at least 1, got 0"),
        (["--text", "a", "--max-new-tokens", 5000], "with 5000 new ones that is more than the 4096 that the model"),
        (["--text", "a" * 5000], "tokens, and with 128 new ones that is more than the 4096"),
        (["--text", "a", "--temperature", -1], "temperature must be 0"),
        (["--text", "a", "--top-p", 0.9], "--top-p and --top-k are of draws, and --temperature 0 draws nothing"),
        (["--text", "a", "--top-k", 5], "--top-p and --top-k are of draws, and --temperature 0 draws nothing"),
        (["--text", "a", "--waves", 0], "waves must be"),
        (["--text", "a", "--experts", "int3"], "experts must be one of checkpoint, "),
        (["--text", "a", "--launcher", "torchrun", "--restarts", 1], "under torchrun ranks are not restarted"),
        (["--text", "a", "--model", "{tmp}"], "holds no config.json"),
        (["--text", "a", "--model", "{tmp}/bare"], "has no tokenizer that can be read"),
        (["--text", "a", "--model", "{tmp}/empty-handed"], "holds neither model.safetensors.index.json nor model"),
        (["--text", "a", "--model", "{tmp}/cut"], "model.safetensors is truncated"),
    ],
)
def test_a_wrong_request_exits_with_2_and_starts_no_rank(
    model: Path, tmp_path: Path, arguments: list[object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("megamoe.launch.generation.generate.MegaMoECluster", started)
    files = {
        "empty": "\n\n",
        "broken": '{"text": "a"}\n{"text":',
        "other": '{"prompt": "a"}',
        "twice": '{"id": "a", "text": "a"}\n{"id": "a", "text": "b"}',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((model / "config.json").read_bytes())
    for name in ("empty-handed", "cut"):
        shutil.copytree(model, tmp_path / name)
    (tmp_path / "empty-handed" / "model.safetensors").unlink()
    os.truncate(tmp_path / "cut" / "model.safetensors", 100_000)
    given = [str(each).format(tmp=tmp_path) for each in arguments]
    assert said in refused("generate", *(() if "--model" in given else ("--model", model)), *given)


# ---- its parts ----


def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    talk = Given("a", ({"role": "user", "content": "Hi"},))
    (prompt,) = encode([talk], tokenizer)
    assert tokenizer.decode(prompt.token_ids) == "user: Hi\nassistant: "
    assert encode([Given("a", "Hi")], tokenizer) == (prompt,)
    assert encode([Given("a", "Hi")], tokenizer, raw=True) == (Prompt("a", tuple(tokenizer("Hi")["input_ids"])),)
    with pytest.raises(ValueError, match="prompt a is a conversation"):
        encode([talk], tokenizer, raw=True)
    (tmp_path / "file").write_text('{"id": 3, "text": "Hi"}')
    assert read_prompts(tmp_path / "file") == [Given("3", "Hi")]


def test_text_streams_in_order_and_in_whole_letters() -> None:
    tokenizer = byte_tokenizer()
    first, second = tokenizer("a\N{ROCKET}b")["input_ids"], tokenizer("cd")["input_ids"]
    stream = TextStream(tokenizer, 2)
    assert stream.add(1, second, True) == []
    assert stream.add(0, first[:3], False) == [(0, "a", False)]
    assert stream.add(0, first[3:5], False) == [(0, "\N{ROCKET}", False)]
    assert stream.add(0, first[5:], True) == [(0, "b", True), (1, "cd", True)]


def test_tokens_that_come_again_are_taken_once_and_must_be_the_same() -> None:
    seen: list[Token] = []
    texts = Texts(GenerationRequest((Prompt("a", (1,)),)), seen.append)
    tokens = [Token(0, 0, 5), Token(0, 1, 6, "length")]
    for token in (tokens[0], *tokens):
        texts.take(token)
    assert seen == tokens
    assert texts.token_ids(0) == (5, 6)
    with pytest.raises(RuntimeError, match="prompt 0 has another token 1 than before the restart"):
        texts.take(Token(0, 1, 7))


def test_times_of_tokens_that_ranks_write_down_are_the_ranks_own_and_loading_is_none_of_them(tmp_path: Path) -> None:
    """Under torchrun tokens are read late, many at once; the times are those at which they were there."""
    texts = Texts(GenerationRequest((Prompt("a", (1,)), Prompt("b", (1,)))), lambda _: None)
    start = texts.begun
    files = TokenFiles(tmp_path, 2, texts.begin, texts.take)
    files.poll()
    assert texts.begun == start
    first = [
        {"at_s": start + 10},
        *({"at_s": start + at, **asdict(Token(0, i, 7))} for i, at in enumerate((11, 12, 13))),
    ]
    second = [{"at_s": start + 10.5}, {"at_s": start + 11.5, **asdict(Token(1, 0, 7))}]
    for rank, lines in enumerate((first, second)):
        (tmp_path / f"tokens-{rank}").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files.poll()
    files.poll()
    assert [texts.new_tokens, texts.begun] == [4, pytest.approx(start + 10.5)]
    assert texts.ttft_ms == pytest.approx(750)
    assert texts.tpot_ms == pytest.approx(1000)
    assert texts.tokens_per_s == pytest.approx(4 / 2.5)


def test_without_the_english_model_a_tiny_one_answers_and_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from megamoe.launch.cluster.cluster import MegaMoECluster

    monkeypatch.setattr("megamoe.launch.generation.answer.can_write_english", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with model_for_answers(lambda *_: None) as (path, model, stays):
        answering = Answering("Why?", path)
        with MegaMoECluster(1, launcher="spawn", threads=1) as cluster:
            texts = answering.on(OnCluster(cluster))
    report = answering.report(texts, texts, model, stays)
    assert INSTALL in report.model
    assert report.new_tokens > 0
    assert report.path == ""
    assert not path.exists()
    assert not list(tmp_path.iterdir())


def test_two_demos_at_once_make_the_model_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, made, said = tmp_path / "dense.gguf", list[Path](), list[str]()
    source.write_bytes(b"weights")
    waiting = threading.Event()

    def make(_: Path, path: Path, **options: Any) -> None:
        options["progress"]("writing", 0, 1)
        assert waiting.wait(30)  # until the other one is kept waiting
        path.mkdir()
        made.append(path)

    def progress(what: str, _: int, __: int) -> None:
        said.append(what)
        if what.startswith("waiting"):
            waiting.set()

    monkeypatch.setattr("megamoe.launch.generation.answer.can_write_english", lambda: True)
    monkeypatch.setattr("megamoe.launch.generation.answer.find_smollm2", lambda: source)
    monkeypatch.setattr("megamoe.launch.generation.answer.upcycle", make)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found: list[Path] = []

    def demo() -> None:
        with model_for_answers(progress) as (path, _, stays):
            assert stays
            found.append(path)

    demos = [threading.Thread(target=demo) for _ in range(2)]
    for each in demos:
        each.start()
    for each in demos:
        each.join()
    assert found == [made[0]] * 2
    assert len(made) == 1
    assert sorted(said) == ["waiting for the model, which another process makes", "writing"]
    assert list((tmp_path / "cache" / "megamoe").iterdir()) == made


def test_a_config_with_a_size_that_is_no_number_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_bytes())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
    assert "'hidden_size' expected int, got str" in refused("generate", "--model", tmp_path / "model", "--text", "a")


def test_a_folder_that_another_process_makes_meanwhile_is_refused(tmp_path: Path) -> None:
    def make() -> None:
        with new_folder(tmp_path / "a") as draft:
            (draft / "file").write_text("ours")
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "file").write_text("theirs")

    with pytest.raises(ValueError, match="made by somebody else meanwhile"):
        make()
    assert (tmp_path / "a" / "file").read_text() == "theirs"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_rank_that_is_killed_half_way_changes_no_letter(model: Path) -> None:
    """The command as it is typed, and one of its ranks killed once text has come."""
    arguments = ("generate", "--model", str(model), "--text", "one", "--text", "three", "--max-new-tokens", "100")
    line = [*COMMAND, *arguments, "--raw", "--restarts", "1", "--deadline-s", "100"]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        first = running.stdout.read(1)  # the first letter of the first text
        ranks = ranks_of(psutil.Process(running.pid))
        assert len(ranks) == 2
        ranks[1].kill()
        text, said = first + running.stdout.read(), running.stderr.read()
    assert running.returncode == 0, said
    assert "replaced" in said
    plain = invoked(*arguments, "--raw", "--ranks", 1)
    assert plain.exit_code == 0, plain.output
    assert text.splitlines()[:-1] == plain.stdout.splitlines()[:-1]  # the last says how long it took
