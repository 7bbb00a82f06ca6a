"""Paths as users give them mean the same everywhere: with ~, as bytes, behind links, from a folder left meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamoe.catalog.load import load_hardware
from megamoe.launch.terminal import with_homes
from megamoe.paths import lasting_path_of, path_of
from megamoe.planner.validation.tables import read_table
from megamoe.schedule.machine import read_runs
from megamoe.trace.timeline import Timeline
from tests.commands import refused

DATA = Path(__file__).parents[1] / "docs" / "data"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another folder to be in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))  # of kernels
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_path_is_what_a_shell_would_make_of_it(home: Path) -> None:
    for given in ("~/x", b"~/x", Path("~/x"), "~/x/"):
        assert path_of(given) == home / "x", given
    assert path_of("~") == home
    assert path_of("~root/x") != Path("~root/x")
    assert path_of("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert path_of(path_of("./~/x")) == Path.cwd() / "~" / "x", "a second look changes nothing"
    assert path_of("ä/ö".encode()) == Path("ä/ö")
    assert path_of("x") == Path("x")
    assert lasting_path_of("x") == Path.cwd() / "x"


@pytest.mark.parametrize("given", [None, 3, "", b"", "a\0b"])
def test_what_is_no_path_is_refused_by_name(given: Any) -> None:
    with pytest.raises(ValueError, match="target must be a path"):
        path_of(given, "target")


def test_a_relative_path_in_a_folder_that_is_gone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(ValueError, match="source x is relative to a working directory that has been removed"):
        lasting_path_of("x", "source")


@pytest.mark.parametrize(
    ("read", "name"),
    [(load_hardware, "h.yaml"), (read_table, "t.csv"), (read_runs, "r.json"), (Timeline.load, "t.json")],
    ids=["catalog", "table", "runs", "trace"],
)
def test_files_of_the_planner_are_found_at_home(home: Path, read: Callable[[str], object], name: str) -> None:
    (home / name).write_text("")
    with pytest.raises(ValueError, match=rf"{home}/{name}"):
        read(f"~/{name}")


def test_a_verb_expands_every_path_that_it_is_given(home: Path) -> None:
    found: dict[str, Any] = {}
    with_homes(lambda **given: found.update(given))(out=Path("~/x"), runs=[Path("~/y"), Path("z")], text="~/is text")
    assert found == {"out": home / "x", "runs": [home / "y", Path("z")], "text": "~/is text"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--model", "deepseek-v3", "--hardware", "h100", "--report=~/none/x.html"),
        ("plan", "--model=~/none/x.yaml", "--hardware", "h100"),
        ("plan", "--config=~/none/x.yaml"),
        ("validate", "~/none/x.csv"),
        ("calibrate", "~/none/x.json"),
        ("timeline", "~/none/x.json"),
        ("bench", "--trace=~/none/x.json"),
        ("convert", "~/none/x", "~/y", "--experts", "mxfp4"),
        ("upcycle", "~/none/x", "~/y"),
        ("launch", "--ranks", "1", "--checkpoint=~/none/x"),
        ("launch", "--ranks", "1", "--out=~/none/x"),
    ],
    ids=lambda arguments: " ".join(arguments[:1]),
)
def test_a_verb_says_the_path_at_home_that_it_looked_at(home: Path, arguments: tuple[str, ...]) -> None:
    said = refused(*arguments)
    assert f"{home}/none" in said or "no file ~/none/x.yaml" in said, said
    assert not (home / "none").exists()
    assert not (home / "y").exists()
    assert not list(Path.cwd().iterdir())
