"""macOS and Windows, emulated: what must work there does, with the bits that it has here; the rest is refused by name.

No line of this ran on such a system: tests/other_systems says what the emulation is, and what it cannot show.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megamoe.kernels.cpu.library import using
from megamoe.launch.cluster import torchrun_work
from megamoe.launch.doctor import machine
from megamoe.launch.doctor.check import Examination
from megamoe.launch.doctor.exchange import exchange
from megamoe.launch.process import loopback
from megamoe.model.loading import files
from megamoe.model.loading.files import TensorFiles, write_tensors
from tests.other_systems import visit

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "other_systems"
SYSTEMS = ("darwin", "win32")


def on(system: str, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on an emulated system, whose files for temporary use are in cwd."""
    environment = {
        **os.environ,
        "MEGAMOE_SYSTEM": system,
        "PYTHONPATH": os.pathsep.join((str(EMULATION), str(ROOT))),
        "PYTHONIOENCODING": "cp1252" if system == "win32" else "utf-8",
        "TMPDIR": str(cwd),
        "CXX": "no-such-compiler",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        **variables,
    }
    done = [sys.executable, *command]
    return subprocess.run(done, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)


# ---- a program of a user's, and every verb ----


@pytest.fixture(scope="module", params=SYSTEMS)
def visited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The system, and what other_systems/visit.py found there."""
    folder = tmp_path_factory.mktemp(request.param)
    done = on(request.param, str(EMULATION / "visit.py"), str(folder), cwd=folder)
    assert done.returncode == 0, done.stderr
    left = {each.name for each in folder.iterdir()} - {"torchinductor_root"}
    return request.param, {**json.loads(done.stdout), "left": left}


def test_every_module_is_imported_and_every_verb_has_help(visited: tuple[str, dict[str, Any]]) -> None:
    _, found = visited
    assert found["not imported"] == {}
    assert found["verbs without help"] == []


def test_a_layer_and_its_gradients_have_the_bits_of_torchs_path_here(visited: tuple[str, dict[str, Any]]) -> None:
    _, found = visited
    with using(None):
        assert found["layer"] == visit.layer_bits()
        assert found["training"] == visit.training_bits()


def test_one_warning_says_why_there_are_no_kernels(visited: tuple[str, dict[str, Any]]) -> None:
    system, found = visited
    (warning,) = found["warnings"]
    reason = {"darwin": "there is no C++ compiler 'no-such-compiler'", "win32": "not built on Windows, but in WSL"}
    assert warning.count(reason[system]) == 1  # of all paths


def test_openmp_is_asked_for_in_the_way_of_apples_compiler(visited: tuple[str, dict[str, Any]]) -> None:
    system, found = visited
    apples = {"-Wp,-fopenmp", "-undefined", "dynamic_lookup"}
    assert apples & set(found["options"]) == (apples if system == "darwin" else set())
    assert ("-fopenmp" in found["options"]) == (system != "darwin")


def test_checkpoints_are_made_converted_and_read_and_runs_listed(visited: tuple[str, dict[str, Any]]) -> None:
    _, found = visited
    assert (found["checkpoints"]["exit codes"], found["checkpoints"]["tokens"]) == ([0, 0], 7), found["checkpoints"]
    assert found["runs"] == {"here": [0]}
    assert found["left"] == {"tiny", "fp4"}  # no store, no list of runs


def test_the_doctor_looks_at_all_and_advises_nothing_of_linux(visited: tuple[str, dict[str, Any]]) -> None:
    system, found = visited
    checks = {check["name"]: check for check in found["doctor"]["checks"]}
    assert not [check for check in checks.values() if "the check itself failed" in check["found"]]
    for linux in ("apt-get", "/etc/security", "ip link"):
        assert not [check for check in checks.values() if linux in check["fix"]], linux
    assert checks["shared memory"]["found"] == "this system has no /dev/shm"
    if system == "win32":
        assert checks["open files"]["found"] == checks["processes"]["found"] == "this system has no such limit"
        assert checks["experts"]["fix"] == "run it in WSL: wsl --install"


# ---- ranks ----

SIZES = {"ranks": 2, "tokens-per-rank": 8, "hidden": 64, "intermediate": 32, "num-experts": 8, "topk": 2, "repeats": 1}


def test_ranks_are_spawned_on_a_mac_and_exchange_messages(tmp_path: Path) -> None:
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    done = on("darwin", "-m", "megamoe", "bench", *sizes, "--no-predict", "--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["identical"] is True
    assert report["small"] is False  # which ranks that share memory would have been


def test_what_starts_ranks_is_refused_on_windows_alone(visited: tuple[str, dict[str, Any]]) -> None:
    system, found = visited
    if system == "win32":
        for verb, (code, said) in found["ranks"].items():
            assert code == 2, (verb, said)
            assert "ranks and workers are started on Linux and macOS, this is Windows: run it in WSL" in said, verb
    assert sorted(found["ranks"]) == (["bench", "demo", "generate", "launch"] if system == "win32" else [])


def test_the_doctor_says_on_windows_why_no_ranks_were_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    checks, links = exchange(Examination(2, "cpu"))
    assert (checks[0].state, links) == ("warn", [])
    assert "this is Windows" in checks[0].found


def test_torchrun_needs_no_name_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac's, such as laptop.local, may stand for no address; ranks would look for it until their deadline."""
    monkeypatch.setattr(subprocess, "Popen", began := mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        torchrun_work.run_under_torchrun(2, len)
    command = began.call_args.args[0]
    assert command[command.index("--local-addr") + 1] == "127.0.0.1"


def test_the_loopback_interface_of_a_mac_is_lo0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo0"), (2, "gif0"), (6, "en0")])
    assert loopback().interface == "lo0"


# ---- files, limits, the store ----


def test_a_large_read_goes_in_parts_and_without_preadv_from_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS refuses to read 2 GiB at once; Windows has no read that leaves the file's position alone."""
    tensor, sizes = torch.arange(1000, dtype=torch.int64), list[int]()
    write_tensors({"a": torch.ones(3), "b": tensor}, tmp_path / "model.safetensors")
    monkeypatch.setattr(files, "_AT_ONCE", 3000)
    preadv = os.preadv

    def counted(file: int, views: list[memoryview], start: int) -> int:
        sizes.append(len(views[0]))
        return preadv(file, views, start)

    monkeypatch.setattr(os, "preadv", counted)
    with TensorFiles.open(tmp_path) as opened:
        assert torch.equal(opened.read(opened.entries["b"]), tensor)
    assert sizes == [3000, 3000, 2000]
    monkeypatch.delattr(os, "preadv")
    with TensorFiles.open(tmp_path) as opened, ThreadPoolExecutor(4) as pool:
        for read in pool.map(lambda _: opened.read(opened.entries["b"], first=100, count=800), range(40)):
            assert torch.equal(read, tensor[100:900])


def test_limits_of_a_mac_are_raised_as_a_mac_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    assert machine.open_files(Examination(2, "cpu")).fix == f"ulimit -n {machine._FILES}"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    for look, name in ((machine.processes, "maxproc"), (machine.open_files, "maxfiles")):
        assert look(Examination(2, "cpu")).fix.startswith(f"raise the hard limit: sudo launchctl limit {name} ")


def test_a_clone_without_symbolic_links_says_what_to_do(tmp_path: Path) -> None:
    """As git makes one on Windows."""
    (tmp_path / "megamoe").mkdir()
    shutil.copy(ROOT / "megamoe" / "__init__.py", tmp_path / "megamoe")
    (tmp_path / "megamoe" / "parallel").write_text("../parallel")
    done = [sys.executable, "-c", "import megamoe"]
    said = subprocess.run(done, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False).stderr
    assert "ImportError: " in said
    assert "git config core.symlinks true; git checkout -- megamoe" in said
