"""The doctor: every finding has a state and a fix where one is due, and ranks that hang or die are findings in time."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from megamoe.kernels.cpu import library
from megamoe.kernels.cpu.paths import worthwhile
from megamoe.launch import devices
from megamoe.launch.cli.doctor import _print, doctor
from megamoe.launch.cluster.ray.session import connect
from megamoe.launch.devices import DEVICE_TYPES, device_of, device_type, num_devices, present_device
from megamoe.launch.doctor import machine, software
from megamoe.launch.doctor.check import Check, Examination, Link
from megamoe.launch.doctor.doctor import LOOK_AT, examine
from megamoe.launch.doctor.exchange import Trial, exchange, try_backend
from megamoe.launch.process import share_of_cores
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.group import BACKENDS, EPGroup
from megamoe.parallel.interfaces import Interface
from megamoe.schedule import limits

BETWEEN_RANKS = [*BACKENDS.values(), "links"]
CPU = Examination(ranks=2, device="cpu")


def command(*arguments: object) -> Result:
    app = typer.Typer(add_completion=False)
    app.command()(doctor)
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def report() -> Any:
    """What the command says as JSON, with three ranks that try everything."""
    done = command("--ranks", 3, "--device", "cpu", "--deadline-s", 60, "--format", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# ---- the whole of it ----


def test_every_check_has_a_state_and_a_fix_exactly_where_one_is_due(report: Any) -> None:
    assert set(report) == {"checks", "links", "ok"}
    names = [check["name"] for check in report["checks"]]
    assert names == [*(look.__name__.replace("_", " ").replace(" version", "") for look in LOOK_AT), *BETWEEN_RANKS]
    for check in report["checks"]:
        assert set(check) == {"name", "state", "found", "fix"}
        assert check["state"] in ("ok", "warn", "fail")
        assert bool(check["fix"]) == (check["state"] != "ok")
        assert check["found"]
        assert "the check itself failed" not in check["found"]
    assert report["ok"] == all(check["state"] != "fail" for check in report["checks"])


def test_gloo_is_tried_and_what_has_no_device_is_not(report: Any) -> None:
    found = {check["name"]: check for check in report["checks"]}
    assert found["gloo"]["state"] == "ok"
    assert "all-reduce and messages between 3 ranks" in found["gloo"]["found"]
    assert found["hccl"] == {"name": "hccl", "state": "ok", "found": "not tried: no npu device", "fix": ""}


def test_every_link_is_measured_both_ways(report: Any) -> None:
    assert [(link["from"], link["to"]) for link in report["links"]] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    for link in report["links"]:
        assert set(link) == {"from", "to", "gb_s", "latency_us"}
        assert 0.001 < link["gb_s"] < 1000
        assert 1 < link["latency_us"] < 1e6


def test_without_exchange_no_rank_is_started_and_the_table_fits_80_columns() -> None:
    done = command("--no-exchange", "--device", "cpu", "--ranks", 200)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("not tried: --no-exchange") == len(BETWEEN_RANKS)
    assert re.search(r"^ *cores +warn ", done.stdout, re.MULTILINE)
    assert "fix: use at most --ranks" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--interface", "nope0"], "no interface called 'nope0' has an IP address; there are "),
        (["--device", "tpu"], "device type 'tpu' is not one of cpu, cuda, npu"),
        (["--ranks", 0], "ranks must be in [1, 256], got 0"),
        (["--deadline-s", 0], "deadline_s must be positive and finite, got 0"),
    ],
    ids=["interface", "device", "ranks", "deadline"],
)
def test_wrong_requests_end_in_2_and_say_what_there_is(arguments: list[object], said: str) -> None:
    done = command("--format", "json", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert "127.0.0.1" in done.stderr or "nope0" not in said


@pytest.mark.skipif(num_devices("npu") > 0, reason="has such a device")
def test_a_device_that_is_not_there_fails_with_1() -> None:
    done = command("--device", "npu", "--no-exchange", "--format", "json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1
    assert found["ok"] is False
    assert [check["name"] for check in found["checks"] if check["state"] == "fail"] == ["devices"]


# ---- ranks that do not do what they should ----


def hangs(group: EPGroup, trial: Trial) -> list[Link]:
    if group.rank == 1:
        time.sleep(120)
    return try_backend(group, trial)


def dies(group: EPGroup, _: Trial) -> list[Link]:
    if group.rank == 1:
        os._exit(7)
    return []


def refuses(group: EPGroup, _: Trial) -> list[Link]:
    raise KeyError(f"rank {group.rank} has no such thing")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (hangs, "rank 1 did not finish within the deadline"),
        (dies, r"rank 1 \(process \d+\) died: exit code 7"),
        (refuses, "rank 0 has no such thing"),
    ],
)
def test_a_rank_that_fails_is_a_finding_within_the_deadline(work: Any, said: str) -> None:
    others = active_children()  # other tests' ranks, and spawn's own
    begun, deadline_s = time.monotonic(), 4.0
    checks, links = exchange(Examination(2, "cpu", deadline_s=deadline_s), work)
    assert time.monotonic() - begun < deadline_s + 3
    assert [check.name for check in checks] == BETWEEN_RANKS
    assert checks[0].state == "fail"
    assert re.search(said, checks[0].found), checks[0].found
    assert "--deadline-s 12" in checks[0].fix
    assert not links
    assert set(active_children()) <= set(others)


def test_ranks_that_have_no_time_to_start_are_a_finding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_TEST_GIVEN", "so that ranks are spawned: a fork is there in time")
    begun = time.monotonic()
    checks, _ = exchange(Examination(2, "cpu", deadline_s=0.05))
    assert time.monotonic() - begun < 5
    assert checks[0].state == "fail"
    assert "rank 0 did not start within 0.05 s" in checks[0].found


def test_one_rank_has_no_links() -> None:
    checks, links = exchange(Examination(1, "cpu", deadline_s=60))
    assert [check.state for check in checks] == ["ok"] * len(checks)
    assert checks[-1].found == "not measured: one rank has none"
    assert not links


# ---- single checks ----


def test_a_check_that_trips_is_a_finding_and_the_rest_goes_on() -> None:
    def left_shoe(_: Examination) -> Check:
        raise OSError("no such foot")

    found = examine(CPU, look_at=(left_shoe, software.python), between=lambda _: ([], []))
    assert [(check.name, check.state) for check in found.checks] == [("left shoe", "warn"), ("python", "ok")]
    assert "OSError: no such foot" in found.checks[0].found


LOW = """
import resource
from megamoe.launch.doctor.check import Examination
from megamoe.launch.doctor.machine import open_files
for soft, hard in ((1024, 4096), (512, 512)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    check = open_files(Examination(2, "cpu"))
    print(check.state, check.fix, sep="|")
"""


def test_few_open_files_are_a_warning_with_a_fix_that_the_hard_limit_allows() -> None:
    done = subprocess.run([sys.executable, "-c", LOW], capture_output=True, text=True, timeout=60, check=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("warn|ulimit -n 4096  # more needs /etc/security/limits.conf")
    assert second.startswith("warn|raise the hard limit: /etc/security/limits.conf")


def groups(folder: Path, lines: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Control groups as the kernel shows them: the lines of /proc/self/cgroup, and files below /sys/fs/cgroup."""
    own = folder / "cgroup"
    own.write_text(lines)
    for name, text in files.items():
        file = folder / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    monkeypatch.setattr(limits, "OWN_CGROUPS", own)
    monkeypatch.setattr(limits, "CGROUPS", folder / "tree")


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("350000 100000", 3), ("50000 100000", 1), ("max 100000", 8), ("max", 8), ("", 8), ("100000 0", 8)],
)
def test_threads_are_as_many_as_the_control_group_and_affinity_leave_cores(
    quota: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups(tmp_path, "0::/a\n", {"a/cpu.max": quota}, monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert (limits.cores(), share_of_cores(1), share_of_cores(16)) == (threads, threads, 1)
    assert share_of_cores(2) == max(1, threads // 2)


@pytest.mark.parametrize(
    ("quota", "period", "expected"), [("150000", "100000", 1.5), ("-1", "100000", None), ("100000", "0", None)]
)
def test_control_groups_of_version_1_bound_what_they_say(
    quota: str, period: str, expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"cpu/a/cpu.cfs_quota_us": quota, "cpu/a/cpu.cfs_period_us": period}
    groups(tmp_path, "4:memory:/a\n3:cpu:/a\n", files, monkeypatch)
    assert limits.cpu_quota() == expected


def test_control_groups_that_may_not_be_read_bound_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups(tmp_path, "0::/a\n", {"a/cpu.max": "100000 100000"}, monkeypatch)
    assert limits.cpu_quota() == 1.0

    def refused(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    whole = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **_: refused() if path.name == "cpu.max" else whole(path))
    assert limits.cpu_quota() is None
    monkeypatch.setattr(Path, "read_text", refused)
    assert limits.cpu_quota() is None


def test_caches_that_cores_share_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores, two of which have a last level of cache together: 2 x 32 MiB of it for three of them."""
    for core in range(4):
        both = "0-1" if core < 2 else "2-3"
        levels = (("1", "48K", str(core)), ("2", "1M", str(core)), ("3", "32768K", both))
        for number, (level, size, shared) in enumerate(levels):
            cache = tmp_path / f"cpu{core}" / "cache" / f"index{number}"
            cache.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (cache / name).write_text(f"{text}\n")
    monkeypatch.setattr(limits, "_CORES", tmp_path)
    for cores, expected in (({0, 1, 2}, 2 * 32 << 20), ({3}, 32 << 20), ({7}, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores, raising=False)
        assert limits.cache_bytes() == expected
    (tmp_path / "cpu3" / "cache" / "index2" / "size").write_text("0\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert limits.cache_bytes() == 1 << 20, "what cannot be read counts as none"


def test_a_machine_whose_loopback_is_down_is_told_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    assert machine.loopback(CPU).state == "ok"
    monkeypatch.setattr(socket, "create_connection", unreachable)
    check = machine.loopback(CPU)
    assert (check.state, check.found, check.fix) == ("fail", "Network is unreachable", "ip link set lo up")
    starts: tuple[Callable[[], object], ...] = (lambda: LocalRanks(2), lambda: connect("local", 2, 5.0))
    for start in starts:
        with pytest.raises(RuntimeError, match="loopback interface, which takes nothing: Network is unreachable"):
            start()


def test_a_machine_without_an_interface_that_is_up_fails_and_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "list_interfaces", lambda: [Interface("lo", "127.0.0.1", True, False, 0)])
    assert machine.interfaces(CPU).state == "fail"


@pytest.mark.parametrize(
    ("lines", "files"),
    [
        ("0::/a/b\n", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        ),
    ],
    ids=["version2-limit_above", "version1"],
)
def test_half_a_core_is_too_little_for_two_ranks(
    lines: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups(tmp_path, lines, files, monkeypatch)
    check = machine.cores(CPU)
    assert check.state == "warn"
    assert check.found.startswith("0.5 usable")
    assert "the control group allows 0.5" in check.found


def test_memory_ends_where_the_control_group_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": str(2**30), "memory.current": str(2**30 - 2**28)}
    groups(tmp_path, "0::/\n", files, monkeypatch)
    check = machine.memory(Examination(1, "cpu"))
    assert (check.state, check.found.startswith("0.2 GiB free")) == ("warn", True)
    assert "control group" in check.found


def test_without_control_groups_nothing_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OWN_CGROUPS", tmp_path / "none")
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert "control group" not in machine.cores(CPU).found
    assert "control group" not in machine.memory(CPU).found
    assert machine.shared_memory(CPU).state == "ok"


def test_several_interfaces_and_none_named_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [Interface(name, f"192.0.2.{number}", False, True, 0) for number, name in enumerate(("net1", "net2"), 1)]
    monkeypatch.setattr(machine, "list_interfaces", lambda: there)
    monkeypatch.setattr(machine, "choose", lambda **_: there[0])
    check = machine.interfaces(CPU)
    assert check.state == "warn"
    assert check.fix.startswith("megamoe doctor --interface net1")
    assert "also net2 (192.0.2.2)" in check.found
    assert machine.interfaces(Examination(2, "cpu", interface="net1")).state == "ok"


@pytest.mark.parametrize(
    ("text", "version"),
    [("2.11.0+cpu", (2, 11)), ("2.9.0.dev20250901", (2, 9)), ("3", (3,)), ("2.11.0a0+git", (2, 11))],
)
def test_versions_are_compared_by_their_first_two_numbers(text: str, version: tuple[int, ...]) -> None:
    assert software.parse_version(text) == version


def test_an_old_torch_fails_and_missing_ray_and_triton_warn_where_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.1+cpu")
    assert software.torch_version(CPU) == Check("torch", "fail", "2.9.1+cpu", "pip install 'torch>=2.11'")
    monkeypatch.setattr(software, "_installed", lambda *_: None)
    assert software.ray(CPU).fix == "pip install 'megamoe[ray]'"
    assert software.triton(CPU).state == "ok"
    assert software.triton(Examination(2, "cuda")).fix == "pip install triton"


def test_a_fix_without_a_fault_and_a_fault_without_a_fix_are_refused() -> None:
    with pytest.raises(ValueError, match="a fix belongs to warn and fail"):
        Check("x", "ok", "fine", "do nothing")
    with pytest.raises(ValueError, match="a fix belongs to warn and fail"):
        Check("x", "fail", "broken")


@pytest.mark.parametrize("size", [2, 6, 16])
def test_tables_of_any_number_of_ranks_fit_80_columns(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    links = tuple(Link(a, b, 25.123, 12345.6) for a in range(size) for b in range(size) if a != b)
    checks = (Check("x", "warn", "found " * 40, "type " * 40), Check.ok("brackets", "[bold]as they are[/]"))
    _print(checks, links, size)
    said = capsys.readouterr().out
    assert "[bold]as they are[/]" in said
    assert "25.12" in said
    assert max(map(len, said.splitlines())) <= 80


# ---- device types ----


def test_what_computes_the_experts_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    path = worthwhile()[0]
    assert software.experts(CPU).found == f"kernels {path.name} on cpu, sums in order {path.arithmetic}"
    monkeypatch.setattr(software, "find", lambda _: (None, ["avx2: there is no C++ compiler 'c++'"]))
    check = software.experts(CPU)
    assert (check.state, check.found) == ("warn", "torch on cpu, slower; not avx2: there is no C++ compiler 'c++'")
    assert "g++" in check.fix
    refused = f"avx2: k.so cannot be loaded: failed to map segment: Operation not permitted; {library.ELSEWHERE}"
    monkeypatch.setattr(software, "find", lambda _: (None, [refused]))
    assert software.experts(CPU).fix == library.ELSEWHERE
    monkeypatch.setattr(software, "keeps_bits", lambda *_: False)
    assert "its products depend on the batch on this machine" in software.experts(CPU).found
    assert software.experts(Examination(2, "npu")).found == "there is no npu to compute them"
    monkeypatch.setattr(software, "num_devices", lambda _: 1)
    for kernels, said in ((True, "Triton kernels on cuda"), (False, "torch on cuda")):
        monkeypatch.setattr(software, "has_kernels", lambda _, found=kernels: found)
        assert software.experts(Examination(2, "cuda")).found == said


def test_tiles_that_the_system_does_not_grant_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"amx_tile": True, "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    for granted, said in ((True, "AMX-BF16"), (False, "AMX-BF16, but the system does not grant AMX's tiles")):
        monkeypatch.setattr(software, "may_use_tiles", lambda found=granted: found)
        assert software.cpu_instructions(CPU).found == said


def test_every_backend_has_a_device_type_and_every_device_type_its_names() -> None:
    assert {name: kind.backend for name, kind in DEVICE_TYPES.items()} == BACKENDS
    assert [kind.ray_resource for kind in DEVICE_TYPES.values()] == ["CPU", "GPU", "NPU"]
    assert [device_of(name, 3) for name in DEVICE_TYPES] == ["cpu", "cuda:3", "npu:3"]
    assert num_devices("cpu") == 1
    assert present_device() in DEVICE_TYPES


def test_an_interface_is_named_so_that_no_other_begins_with_it() -> None:
    assert device_type("cpu").interface_setting("eth1") == {"GLOO_SOCKET_IFNAME": "eth1"}
    assert device_type("cuda").interface_setting("eth1") == {"NCCL_SOCKET_IFNAME": "=eth1"}
    assert device_type("npu").interface_setting("eth1") == {"HCCL_SOCKET_IFNAME": "=eth1"}


def test_rocm_is_cuda_with_devices_shared_out_by_hips_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.hip", "7.1.0")
    assert device_type("cuda") is devices.ROCM
    assert device_type("cuda").visible_devices == "HIP_VISIBLE_DEVICES"
    assert device_type("npu").visible_devices == "ASCEND_RT_VISIBLE_DEVICES"
