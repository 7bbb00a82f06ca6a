"""The command line: the demo ends in "identical", bad requests in exit code 2, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import megamoe
from megamoe.launch.terminal import parse_waves
from megamoe.model.deepseek_v4.synthetic import write_checkpoint
from tests.commands import invoked, refused
from tests.processes import ranks_of
from tests.test_model import CONFIG, LAYER_1, truncate

COMMAND = [sys.executable, "-c", "from megamoe.launch.cli.main import main; main()"]


def command(*arguments: object, **options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80", **options}
    line = [*COMMAND, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the demo's own, but quick to run: the real vocabulary, small experts."""
    path: Path = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_checkpoint(path, CONFIG.model_copy(update={"vocab_size": 129_280, "hidden_size": 32}))
    return path


@pytest.mark.parametrize("launcher", ["ray", "spawn", "torchrun"])
def test_demo_prints_json_alone_with_every_rank_and_identical(checkpoint: Path, launcher: str, tmp_path: Path) -> None:
    ranks = 2 if launcher == "torchrun" else 3
    started: list[object] = ["--ranks", ranks, "--waves", "2", "--format", "json", "--checkpoint", checkpoint]
    if launcher == "spawn":  # of a text of the user's own
        text = tmp_path / "notes.txt"
        text.write_text("Experts are split into waves. 专家分成几波。\n" * 100)
        started += ["--text", text]
    if launcher != "ray":  # which is what starts ranks where it is installed
        started += ["--launcher", launcher]
    started += ["--question", ""]
    done = command("demo", *started)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["launcher"] == launcher
    assert report["text"].startswith("notes.txt" if launcher == "spawn" else "Alice")
    assert report["identical"] is True
    assert report["answer"] is None
    assert [rank["rank"] for rank in report["ranks"]] == list(range(ranks))
    assert sum(rank["tokens"] for rank in report["ranks"]) == report["tokens"] == report["one_rank"]["tokens"] > 1000
    rows = report["tokens"] * report["topk"] * report["layers"]
    assert sum(rank["rows_local"] + rank["rows_received"] for rank in report["ranks"]) == rows
    for rank in report["ranks"]:
        assert rank["waves"] == 2
        assert rank["bytes_sent"] > 0
        assert rank["compute_ms"] > 0
        assert rank["read_mb"] < report["one_rank"]["read_mb"]
    assert report["one_rank"]["bytes_sent"] == 0


def test_one_token_on_four_ranks_is_said_to_be_identical_in_a_table(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "word.txt"
    text.write_text("a")
    done = invoked(
        "demo", "--launcher", "spawn", "--ranks", 4, "--text", text, "--checkpoint", checkpoint, "--question", ""
    )
    assert done.exit_code == 0, done.output
    assert "word.txt: 1 token through " in done.stdout
    assert done.stdout.rstrip().endswith("4 ranks (spawn) against one, every bit of the output: identical")
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "ranks must be at least 1, got 0"),
        (["--ranks", "two"], "Invalid value for '--ranks'"),
        (["--waves", "0"], 'waves must be "auto", a positive integer'),
        (["--waves", "some"], "got 'some'"),
        (["--text", "/nowhere/text.txt"], "text /nowhere/text.txt cannot be read: No such file"),
        (["--checkpoint", "tests"], "tests holds no config.json"),
        (["--deadline-s", "-1"], "deadline_s must be positive and finite, got -1.0"),
        (["--format", "xml"], "Invalid value for '--format'"),
    ],
)
def test_a_wrong_request_exits_with_2_and_says_why(arguments: list[str], said: str) -> None:
    assert said in refused("demo", *arguments)


@pytest.mark.parametrize(
    ("content", "said"), [(b"  \n", "is empty"), (b"\xff\xfe\x00", "is not UTF-8")], ids=["blank", "binary"]
)
def test_a_text_that_is_none_exits_with_2(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "text").write_bytes(content)
    assert said in refused("demo", "--text", tmp_path / "text")


def test_a_truncated_checkpoint_exits_with_2_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    write_checkpoint(path, CONFIG.model_copy(update={"vocab_size": 129_280, "hidden_size": 32}))
    truncate(path)
    said = refused("demo", "--launcher", "spawn", "--ranks", 2, "--question", "", "--checkpoint", path)
    assert f"{LAYER_1} is truncated: it has " in said


def demo_folders(folder: Path) -> list[Path]:
    return list(folder.glob("megamoe-demo-*"))


BEGUN = time.time()
Moment = tuple[str, str, signal.Signals]
MOMENTS: list[Moment] = [
    ("spawn", "writing", signal.SIGINT),
    ("spawn", "ranks_started", signal.SIGINT),
    ("spawn", "ranks_running", signal.SIGTERM),
    ("ray", "ray_started", signal.SIGINT),
    ("ray", "ray_ranks", signal.SIGTERM),
    ("torchrun", "torchrun_ranks", signal.SIGTERM),
]


# the other signal at these moments, and the moment between them
OTHERS: list[Moment] = [
    ("spawn", "writing", signal.SIGTERM),
    ("spawn", "written", signal.SIGINT),
    ("spawn", "written", signal.SIGTERM),
    ("spawn", "ranks_started", signal.SIGTERM),
    ("spawn", "ranks_running", signal.SIGINT),
]


# to reach what comes after the checkpoint is written: its own takes seconds to write
OF_SMALL_EXPERTS = [
    sys.executable,
    "-c",
    "from megamoe.launch import demo; from megamoe.launch.cli.main import main; "
    'demo.SMALL = demo.SMALL.model_copy(update={"hidden_size": 64, "moe_intermediate_size": 64}); main()',
]


@dataclass(frozen=True)
class Ended:
    """What a demo came to that was sent a signal: files and processes are those that it left."""

    returncode: int
    said: str
    files: list[Path]
    processes: list[psutil.Process]


def struck(place: Path, launcher: str, moment: str, signal_number: signal.Signals) -> Ended:
    """Starts a demo whose temporary folder is the place, and sends it the signal at the moment, twice."""
    # a thread each, for two demos run at a time
    environment = {**os.environ, "TMPDIR": str(place), "OMP_NUM_THREADS": "1"}
    command = COMMAND if moment in ("writing", "written") else OF_SMALL_EXPERTS
    line = [*command, "demo", "--launcher", launcher, "--ranks", "2", "--question", ""]
    demo = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        process = psutil.Process(demo.pid)
        reached: Callable[[], bool] = {
            "writing": lambda: any(place.glob("megamoe-demo-*/*")),
            "written": lambda: any(place.glob("megamoe-demo-*/config.json")),
            "ranks_started": lambda: len(ranks_of(process)) == 2,
            "ranks_running": lambda: len(ranks_of(process)) == 2 and met(process),
            "ray_started": lambda: bool(running(process, "/raylet/raylet")),
            "ray_ranks": lambda: len(running(process, "ray::WorkerActor")) == 2,
            "torchrun_ranks": lambda: (
                len(running(process, "megamoe.launch.cluster.torchrun_work")) == 3
            ),  # and torchrun itself
        }[moment]

        def come() -> bool:
            """To look through the machine's processes before all is written, when no rank is there, takes long."""
            return (moment == "writing" or any(place.glob("megamoe-demo-*/config.json"))) and reached()

        until = time.monotonic() + 60
        while not come():
            assert demo.poll() is None, "the demo ended before the moment came"
            assert time.monotonic() < until
            time.sleep(0.05)
        family = process.children(recursive=True)
        demo.send_signal(signal_number)
        demo.send_signal(signal_number)  # an impatient second one changes nothing
        _, said = demo.communicate(timeout=30)
    finally:
        demo.kill()
        demo.wait()
    files = list(place.iterdir())
    return Ended(demo.returncode, said, files, psutil.wait_procs(family, timeout=10)[1])


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Moment, Future[Ended]]]:
    """Demos that are struck at each moment: those of spawn one after another, and those of the others beside them."""
    with ThreadPoolExecutor(1) as spawning, ThreadPoolExecutor(1) as others:
        yield {
            each: (spawning if each[0] == "spawn" else others).submit(struck, tmp_path_factory.mktemp("struck"), *each)
            for each in MOMENTS
        }
        for pool in (spawning, others):
            pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("moment", MOMENTS, ids=[f"{moment}-{number.name}" for _, moment, number in MOMENTS])
def test_a_signal_at_any_point_leaves_no_file_and_no_process(
    endings: dict[Moment, Future[Ended]], moment: Moment
) -> None:
    left_nothing(moment, endings[moment].result(200))


@pytest.mark.soak
@pytest.mark.parametrize("moment", OTHERS, ids=[f"{moment}-{number.name}" for _, moment, number in OTHERS])
def test_nor_does_the_other_signal(tmp_path: Path, moment: Moment) -> None:
    left_nothing(moment, struck(tmp_path, *moment))


def left_nothing(moment: Moment, ended: Ended) -> None:
    launcher, _, signal_number = moment
    assert ended.returncode == (130 if signal_number == signal.SIGINT else 143), ended.said
    # torchrun has its own way of saying that it was ended
    assert launcher == "torchrun" or "Traceback" not in ended.said
    assert not ended.files
    assert not ended.processes


def running(process: psutil.Process, what: str) -> list[psutil.Process]:
    """Those that it started, however indirectly, and whose command line names it"""
    found = []
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [child] if what in " ".join(child.cmdline()) else []
    return found


def met(process: psutil.Process) -> bool:
    """Whether the ranks have met: rank 0 serves the store, and both have sent something through a socket."""
    return all(child.net_connections("tcp") for child in ranks_of(process))


def test_nothing_is_left_in_the_temporary_folder() -> None:
    assert not [each for each in demo_folders(Path(tempfile.gettempdir())) if each.stat().st_mtime > BEGUN]


def test_version_and_help_need_no_torch() -> None:
    assert command("--version").stdout.strip() == megamoe.__version__
    code = "import sys; from megamoe.launch import cli; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert "--tokens" not in command("demo", "--help").stdout
    assert "--ranks" in command("demo", "--help").stdout


@pytest.mark.parametrize(("text", "waves"), [("auto", "auto"), ("4", 4), ("1,3,2", (1, 3, 2))])
def test_waves_are_read_from_the_command_line(text: str, waves: object) -> None:
    assert parse_waves(text) == waves
