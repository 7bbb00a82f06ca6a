"""What commands print: one renderer for tables and JSON, words and figures in their columns, nothing cut off."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file

import megamoe
from megamoe import catalog
from megamoe.catalog.wording import plural, size
from megamoe.launch import output
from megamoe.launch.output import check_folder, emit, say, short, show
from megamoe.launch.terminal import Format, exit_codes
from megamoe.model.loading.files import write_tensors
from megamoe.model.making.files import new_folder
from megamoe.paths import put_whole, write_whole
from tests.commands import files_no_larger_than, invoked, refused

ROWS = [("one", 1, 1234.56, 0.012345, None), (), ("a longer one", None, "loopback", 7.0, "x")]
COLUMNS = {"name": "", "number": ">", "ms": ",.1f", "about": "~", "": ">"}


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, *, folds: bool) -> str:
    monkeypatch.setattr(output, "stdout", Console(width=width, no_color=True))
    show(
        COLUMNS,
        [(*row[:-1], "words that go on " * 3) if row and folds else row for row in ROWS],
        "a title",
        folds=folds,
    )
    return capsys.readouterr().out


def test_words_stand_left_figures_right_and_what_is_not_there_is_a_dash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(monkeypatch, capsys, 80, folds=False).splitlines() == [
        "a title",
        "name          number        ms   about",
        "─" * 41,
        "one                1   1,234.6  0.0123  -",
        "─" * 41,
        "a longer one       -  loopback       7  x",
    ]


def test_a_narrow_terminal_brings_columns_together_and_cuts_nothing_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = printed(monkeypatch, capsys, 40, folds=False).splitlines()
    assert narrow[3] == "one               1  1,234.6 0.0123 -"
    folded = printed(monkeypatch, capsys, 50, folds=True).splitlines()
    assert max(map(len, folded)) <= 50
    assert " ".join(" ".join(folded).split()).count("words that go on") == 6


def test_a_verdict_has_its_colour_at_the_beginning_of_a_line_and_alone_in_a_cell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "stdout", Console(width=80, force_terminal=True, color_system="standard"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    say("HIDDEN  [as it is]")
    show({"check": "", "": "", "found": ""}, [("disk", "warn", "warn of it")])
    said = capsys.readouterr().out
    assert "\x1b[1;32mHIDDEN\x1b[0m  [as it is]" in said
    assert said.count("\x1b[33mwarn") == 1


def test_json_is_printed_alone_and_has_no_value_that_json_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    emit(Format.json, {"a": [1, None]}, lambda: say("a table"))
    assert json.loads(capsys.readouterr().out) == {"a": [1, None]}
    emit(Format.table, {"a": 1}, lambda: say("a table"))
    assert capsys.readouterr().out == "a table\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        emit(Format.json, float("nan"), lambda: None)


def test_numbers_and_nouns() -> None:
    assert [short(each) for each in (None, 12345.6, 1.2345, 0.012345, 8.0)] == ["-", "12,346", "1.234", "0.0123", "8"]
    assert [plural(1, "rank"), plural(2, "rank"), plural(0, "process", "processes")] == [
        "1 rank",
        "2 ranks",
        "0 processes",
    ]
    assert [size(each) for each in (12_345, 12_345_678, 9_876_543_210, 98_765_432_100)] == [
        "0.0 MB",
        "12.3 MB",
        "9.88 GB",
        "98.8 GB",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("verb", [("--version",), ("--help",), ("plan", "--help"), ("catalog", "list")], ids=" ".join)
def test_an_output_that_is_full_or_closed_is_no_traceback(verb: tuple[str, ...]) -> None:
    command = " ".join([sys.executable, "-m", "megamoe", *verb])
    found = {
        where: subprocess.run(
            ["sh", "-c", f"{command} {where}"], capture_output=True, text=True, timeout=60, check=False
        )
        for where in (">/dev/full", ">&-")
    }
    full, closed = found.values()
    assert full.returncode == 1
    assert full.stderr.strip() == "the output cannot be written: No space left on device"
    assert closed.returncode == 0
    assert closed.stderr == ""


def test_a_name_that_the_output_has_no_letters_for_is_written_in_escapes(tmp_path: Path) -> None:
    shipped = Path(catalog.__file__).parent / "machines" / "cpu.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped.read_text("utf-8").replace("Two cores", "Zwei Kerne für uns"), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "megamoe", "catalog", "show", str(mine), "--kind", "machines"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "NO_COLOR": "1"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Zwei Kerne f\\xfcr uns" in done.stdout


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.EACCES, 2, "wrong request: [a]: Permission denied: give a place that this user may use"),
        (errno.EROFS, 2, "wrong request: [a]: Read-only file system: give a place that this user may use"),
        (errno.EISDIR, 2, "wrong request: [a]: Is a directory"),
        (errno.ENOSPC, 1, "failed: [a]: No space left on device: make room and run it again"),
        (errno.ENOENT, 1, "failed: [a]: No such file or directory"),
    ],
    ids=["rights", "read-only", "folder", "full", "gone"],
)
def test_what_the_system_refuses_of_a_file_is_one_line(
    capsys: pytest.CaptureFixture[str], number: int, code: int, said: str
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as ended, exit_codes():
        raise OSError(number, os.strerror(number), "[a]")
    assert ended.value.exit_code == code
    assert capsys.readouterr().err.splitlines() == [said]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(BrokenPipeError), exit_codes():  # of no file
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


STRUCK = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
WHILE_IMPORTING = f"""
import sys
class Strikes:
    def find_spec(self, name, *_):
        if name == "megamoe.launch.cli.main":
            {STRUCK}
sys.meta_path.insert(0, Strikes())
from megamoe.__main__ import main
main()
"""
IN_A_VERB = f"""
from megamoe.launch.terminal import exit_codes
import typer
def verb():
    with exit_codes():
        exec({STRUCK!r})
app = typer.Typer()
app.command()(verb)
app()
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (WHILE_IMPORTING, "interrupted"),
        (IN_A_VERB, "interrupted; all that was started is stopped and removed"),
    ],
    ids=["while_importing", "in_a_verb"],
)
def test_ctrl_c_ends_with_130_and_one_line_whatever_runs(program: str, said: str) -> None:
    """Python itself ends by the signal, whatever catches it, where a KeyboardInterrupt has passed an exec()."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.splitlines()) == (130, [said])


VERBS = {
    "validate": (),
    "recommend": (
        *("--model", "deepseek-v3", "--hardware", "h100", "--requests-per-s", 10),
        *("--input-tokens", 100, "--output-tokens", 10),
    ),
    "calibrate": (Path(__file__).parents[1] / "docs" / "data" / "lab_runs.json",),
}


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("verb", VERBS)
def test_a_signal_ends_a_verb_of_the_planner_with_its_code_and_one_line(
    monkeypatch: pytest.MonkeyPatch, verb: str, number: signal.Signals, code: int, said: str
) -> None:
    monkeypatch.setattr(f"megamoe.launch.cli.planner.{verb}.emit", lambda *_: signal.raise_signal(number))
    done = invoked(verb, *VERBS[verb], COLUMNS="200")
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.splitlines() == [f"{said}; all that was started is stopped and removed"]


def test_ctrl_c_after_all_is_done_changes_nothing() -> None:
    """Python takes the answer to signals away before it takes apart what was imported, which can last for a second."""
    late = """
import builtins, os, signal, sys
class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
        kill(process, number)
builtins.late = Late()
from megamoe.__main__ import main
sys.argv = ["megamoe", "--version"]
main()
"""
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == megamoe.__version__


def test_a_file_that_does_not_fit_leaves_no_half_of_it(tmp_path: Path) -> None:
    asked = ("--model", "deepseek-v3", "--hardware", "h100", "--ep", 16)
    with files_no_larger_than(10_000):
        done = invoked("plan", *asked, "--report", tmp_path / "report.html", COLUMNS="200")
    assert done.exit_code == 1
    hint = "File too large: files may not be as large here: see ulimit -f"
    assert done.stderr.splitlines()[-1] == f"failed: {tmp_path / 'report.html'}: {hint}"
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_calculated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder(tmp_path / "new")
    (tmp_path / "old").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "old" and mode == os.W_OK)
    check_folder(tmp_path / "new")
    with pytest.raises(ValueError, match="old cannot be written by this user"):
        check_folder(tmp_path / "old")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="new cannot be written by this user"):
        check_folder(tmp_path / "new")


def test_a_working_directory_that_is_gone_is_no_folder_to_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ValueError, match=r"report\.html is in no folder that exists"):
        check_folder(Path("report.html"))


# ---- a file in the place of another ----


def test_a_file_that_does_not_fit_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    (old := tmp_path / "report.html").write_text("old")
    with files_no_larger_than(1000), pytest.raises(OSError, match="File too large") as refusal:
        write_whole(old, "x" * 2000)
    assert refusal.value.filename == str(old)
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_a_file_takes_the_place_of_another_with_its_rights_also_behind_a_link(tmp_path: Path) -> None:
    (old := tmp_path / "old").write_text("old")
    old.chmod(0o640)
    (link := tmp_path / "link").symlink_to(old)
    with old.open() as reader:
        write_whole(link, b"new")
        assert reader.read() == "old", "who reads it has a whole one"
    assert link.is_symlink()
    assert old.read_text() == "new"
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    write_whole(tmp_path / "fresh", "new")
    (usual := tmp_path / "usual").touch()
    assert (tmp_path / "fresh").stat().st_mode == usual.stat().st_mode


def test_what_others_may_not_read_they_do_not_read_while_it_is_written(tmp_path: Path) -> None:
    (old := tmp_path / "old").touch(0o600)
    rights: list[int] = []

    def make(part: Path) -> None:
        part.write_text("new")
        rights.append(stat.S_IMODE(part.stat().st_mode))

    put_whole(old, make, make)
    assert (rights, old.read_text()) == ([0o600], "new")


def test_links_in_a_circle_are_refused_by_name_and_stay(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.symlink_to(second)
    second.symlink_to(first)
    with pytest.raises(OSError, match=f"{os.strerror(errno.ELOOP)}: '{first}'"):
        write_whole(first, "new")
    assert sorted(tmp_path.iterdir()) == [first, second]
    assert first.is_symlink()


def test_a_file_is_replaced_where_files_have_no_such_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    (old := tmp_path / "old").write_text("old")
    monkeypatch.delattr(os, "geteuid", raising=False)
    write_whole(old, "new")
    assert old.read_text() == "new"
    assert list(tmp_path.iterdir()) == [old]


def test_a_file_whose_place_no_other_can_take_is_written_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of two names, one that is mounted by itself, one in a folder that is another's."""
    (old := tmp_path / "old").write_text("old")
    (same := tmp_path / "same").hardlink_to(old)
    write_whole(same, "two names")
    assert old.read_text() == "two names"
    same.unlink()

    def busy(part: Path, place: Path) -> Path:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(part), None, str(place))

    before = old.stat().st_ino
    monkeypatch.setattr(Path, "replace", busy)
    write_whole(old, "mounted")
    assert (old.read_text(), old.stat().st_ino) == ("mounted", before)
    write_tensors({"hidden": torch.ones(2)}, old)
    assert torch.equal(load_file(old)["hidden"], torch.ones(2))
    assert old.stat().st_ino == before
    assert list(tmp_path.iterdir()) == [old]


_ON_MOUNTS = """
import subprocess, sys, torch
from pathlib import Path
from megamoe.model.loading.files import write_tensors
from megamoe.model.making.files import new_folder
from megamoe.paths import write_whole
place = Path(sys.argv[1])
def mount(*given): subprocess.run(["mount", *map(str, given)], check=True)
mount("--make-rprivate", "/")
for name in ("file", "fixed"):
    (place / name).touch()
    mount("--bind", place / name, place / name)
mount("-o", "remount,bind,ro", place / "fixed")
(place / "folder").mkdir()
mount("-t", "tmpfs", "tmpfs", place / "folder")
for write in (lambda file: write_whole(file, "new"), lambda file: write_tensors({"a": torch.ones(2)}, file)):
    write(place / "file")
    assert (place / "file").stat().st_size
    try:
        write(place / "fixed")
    except OSError as refusal:
        assert refusal.filename == str(place / "fixed"), refusal
        assert refusal.strerror == "Read-only file system", refusal
with new_folder(place / "folder") as draft:
    (draft / "config.json").touch()
    (draft / "part").mkdir()
print(sorted(each.name for each in (place / "folder").iterdir()), sorted(each.name for each in place.iterdir()))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="mounts need root and unshare",
)
def test_mounts_are_written_to(tmp_path: Path) -> None:
    """A file and an empty folder that a container has from its host, and a file that is read-only."""
    line = ["unshare", "--mount", sys.executable, "-c", _ON_MOUNTS, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in done.stderr or "permission denied" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "['config.json', 'part'] ['file', 'fixed', 'folder']\n", done.stderr


def test_a_new_folder_behind_a_link_leaves_the_link(tmp_path: Path) -> None:
    for name in ("there", "none"):
        (link := tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        if name == "there":
            (tmp_path / name).mkdir()
        with new_folder(link) as draft:
            (draft / "config.json").touch()
        assert link.is_symlink()
        assert [each.name for each in (tmp_path / name).iterdir()] == ["config.json"]


def test_a_pipe_and_a_device_are_written_to(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "report")
    assert os.read(reader, 100) == b"report"
    os.close(reader)
    write_whole(Path(os.devnull), "report")
    asked = ("--requests-per-s", 10, "--input-tokens", 100, "--output-tokens", 10, "--write")
    said = refused("recommend", "--model", "deepseek-v3", "--hardware", "h100", *asked, os.devnull)
    assert f"--write makes two files, and {os.devnull} is none" in said


def test_a_reader_that_has_gone_does_not_keep_files_from_being_written(tmp_path: Path) -> None:
    """`megamoe sweep ... --csv rows.csv | head -0`, and a report into a pipe that nobody reads."""
    asked = "--model deepseek-v3 --hardware h100 --ep 16"
    megamoe_ = f"{sys.executable} -m megamoe"
    line = f"{megamoe_} sweep {asked} --over waves --values 1,2 --csv rows.csv | true; echo ${{PIPESTATUS[0]}} >&2"
    line += f"; {megamoe_} plan {asked} --report /dev/stdout | true; echo ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (tmp_path / "rows.csv").read_text().startswith("waves,")
    assert [said for said in done.stderr.splitlines() if not said.startswith("wrote")] == ["1", "1"]


# ---- what surrounds the command ----


def test_a_terminal_of_no_width_is_as_wide_as_one_that_does_not_say() -> None:
    for verb in ("--version", "--help"):
        line = [sys.executable, "-m", "megamoe", verb]
        found = {
            width: subprocess.run(
                line, env={**os.environ, "COLUMNS": width}, capture_output=True, timeout=60, check=True
            ).stdout
            for width in ("0", "")
        }
        assert found["0"] == found[""] != b""


def test_a_shell_completes_verbs_and_options_without_importing_torch() -> None:
    program = """
import sys
from megamoe.__main__ import main
sys.argv[0] = "megamoe"
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    for words, place, completed in (("pl", "1", "plan"), ("bench rule --dis", "3", "--dispatch-format")):
        asked = {"COMP_WORDS": f"megamoe {words}", "COMP_CWORD": place, "_MEGAMOE_COMPLETE": "complete_bash"}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **asked},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout.split(), done.stderr) == (0, [completed], "")


@pytest.mark.parametrize(
    ("library", "instead", "verb"),
    [
        ("transformers", "sys.modules['transformers'] = None", ("generate", "--model", "m", "--text", "x")),
        ("transformers", "sys.modules['transformers'] = None", ("upcycle", "m", "to")),
        ("transformers", "sys.modules['transformers'] = types.ModuleType('transformers')", ("upcycle", "m", "to")),
        ("transformers", "sys.modules['transformers'] = None", ("convert", "m", "to", "--experts", "mxfp4")),
        ("transformers", "sys.modules['transformers'] = None", ("tiny", "to", "--like", "gpt-oss")),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_what_installs_it(
    library: str, instead: str, verb: tuple[str, ...], tmp_path: Path
) -> None:
    without = f"import sys, types; {instead}; from megamoe.__main__ import main; main()"
    (tmp_path / "m").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", without, *verb], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    state = "which is not installed" if "None" in instead else "newer than the one that is here"
    assert line.startswith(f"wrong request: this needs {library}, {state}")
    assert line.endswith("pip install --upgrade 'megamoe[models]'")
