"""megamoe lab: a lab outlives its command, is whole or not at all, and goes when it is told to; faults from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from megamoe.launch.lab.namespaces import lab
from tests.test_demo import COMMAND, command
from tests.test_lab import needs_lab

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
# torch asks for the name of every address that it connects to: 10 s each where a resolver swallows the question
ENVIRONMENT |= {"RES_OPTIONS": "timeout:1 attempts:1"}
needs_room = pytest.mark.skipif(
    shutil.which("unshare") is None or shutil.which("nsenter") is None, reason="needs util-linux's unshare and nsenter"
)


class Room:
    """This machine as it looks without labs: a mount namespace whose own, empty /run/netns goes when it goes."""

    def __init__(self, process: int) -> None:
        self.enter = ["nsenter", "--mount", "--target", str(process)]
        self.namespaces = Path(f"/proc/{process}/root/run/netns")

    def run(self, *line: object) -> subprocess.CompletedProcess[str]:
        command = [*self.enter, *map(str, line)]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)

    def start(self, *line: object) -> subprocess.Popen[str]:
        command = [*self.enter, *map(str, line)]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, cwd=ROOT, start_new_session=True
        )

    def megamoe(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return self.run(*COMMAND, "lab", *arguments)

    def json(self, *arguments: object) -> Any:
        done = self.megamoe(*arguments, "--format", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refused(self, *arguments: object) -> str:
        done = self.megamoe(*arguments)
        assert done.returncode == 2, (done.returncode, done.stderr)
        assert done.stdout == ""
        return done.stderr

    def names(self) -> list[str]:
        return sorted(path.name for path in self.namespaces.iterdir())


@contextmanager
def a_room() -> Iterator[Room]:
    script = "mkdir -p /run/netns && mount -t tmpfs megamoe /run/netns && echo ready && exec cat"
    pipe = subprocess.PIPE
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        yield Room(holder.pid)
        # the end of its input ends the holder, and with it the mounts that kept the namespaces


@pytest.fixture
def room() -> Iterator[Room]:
    with a_room() as made:
        yield made


@needs_lab
@needs_room
def test_a_lab_outlives_its_command_until_it_is_taken_down(room: Room) -> None:
    built = room.json("up", "--ranks", 2, "--link", "200mbit")
    assert (built["lab"], built["link_gb_s"]) == ("lab1", 0.025)
    assert room.names() == ["megamoe-lab1-r0", "megamoe-lab1-r1", "megamoe-lab1-switch"]
    with room.start("ip", "netns", "exec", "megamoe-lab1-r1", "sleep", "60") as sleeper:
        while not (listed := room.json("status"))[0]["ranks"][1]["processes"]:
            assert sleeper.poll() is None
        assert room.json("down")[0] == {"lab": "lab1", "ranks": 2, "processes_ended": [sleeper.pid]}
        assert sleeper.wait(timeout=10) == -signal.SIGKILL
    assert room.names() == []
    assert [{**each, "ranks": ...} for each in listed] == [
        {
            "lab": "lab1",
            "owner": "kept",
            "process": None,
            "alive": None,
            "whole": True,
            "link_gb_s": 0.025,
            "ranks": ...,
        }
    ]
    assert [rank["processes"] for rank in listed[0]["ranks"]] == [
        [],
        [{"process": sleeper.pid, "command": "sleep 60"}],
    ]
    for rank, (said, started) in enumerate(zip(listed[0]["ranks"], built["ranks"], strict=True)):
        assert said["rank"] == started["rank"] == rank
        assert said["namespace"] == started["namespace"] == f"megamoe-lab1-r{rank}"
        assert said["address"] == started["address"] == f"10.77.0.{rank + 1}"
        assert (said["link_gb_s"], said["faults"]) == (0.025, [])
    assert room.json("status") == []


PROGRAM = """
import faulthandler
faulthandler.dump_traceback_later(60)
import os, torch
from megamoe import init_group
from megamoe.parallel.transport.pairs import Label
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
with init_group("cpu", rank=rank, size=size, init_method="env://", deadline_s=30) as group:
    print(group.transport.gather(torch.tensor([[rank + 7]], dtype=torch.uint8)[0], Label("lab", "counts")).tolist())
"""


@needs_lab
@needs_room
@pytest.mark.timeout(600)  # three seconds alone, three minutes were seen beside other tests
def test_the_lines_that_up_prints_start_ranks_that_meet(room: Room) -> None:
    done = room.megamoe("up", "--ranks", 2, "--name", "mine")
    assert "it stands until: megamoe lab down mine" in done.stderr
    lines = [line.removesuffix(" python your_program.py") for line in done.stdout.splitlines() if line[:3] == "ip "]
    assert len(lines) == 2, done.stdout
    with ExitStack() as stack:
        ranks = [stack.enter_context(room.start(*line.split(), sys.executable, "-c", PROGRAM)) for line in lines]
        said = [rank.communicate(timeout=500) for rank in ranks]
    for slow in [err for _, err in said if "Timeout" in err]:
        warnings.warn(f"a rank took longer than a minute, and was here after one:\n{slow}", stacklevel=1)
    assert [out for out, _ in said] == ["[[7], [8]]\n"] * 2, said


@needs_lab
@needs_room
def test_two_kept_labs_stand_side_by_side_and_are_named_apart(room: Room) -> None:
    room.json("up", "--ranks", 1, "--name", "blue")
    room.json("up", "--ranks", 3, "--name", "blue-2", "--link", "2.5gbit")
    table = room.megamoe("status").stdout
    assert "lab blue: kept, 1 rank, 1gbit links" in table
    assert "lab blue-2: kept, 3 ranks, 2.5gbit links" in table
    assert "2 labs stand on this machine, name one: blue, blue-2" in room.refused("down")
    assert "2 labs stand" in room.refused("fault", "--cut", 0)
    assert "no lab is called 'blu'; the nearest are blue, blue-2" in room.refused("down", "blu")
    assert "a lab called 'blue' stands already" in room.refused("up", "--name", "blue")
    assert room.megamoe("down", "megamoe-blue").stdout == "lab blue is down: 1 rank, 0 processes ended\n"
    assert [each["lab"] for each in room.json("status")] == ["blue-2"]
    assert [each["lab"] for each in room.json("down", "--all")] == ["blue-2"]
    assert room.names() == []
    assert room.json("down", "--all") == []


HELD = "from megamoe.launch.lab.namespaces import lab\nwith lab(1, '1gbit'):\n    print(flush=True)\n    input()\n"


@needs_lab
@needs_room
def test_a_living_processs_lab_is_taken_down_by_force_only(room: Room) -> None:
    line = [*room.enter, sys.executable, "-c", HELD]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (listed,) = room.json("status")
        assert (listed["owner"], listed["process"], listed["alive"]) == ("process", process.pid, True)
        assert f"belongs to process {process.pid}, which is alive: --force" in room.refused("down")
        assert room.json("down", "--all") == []
        assert [each["lab"] for each in room.json("down", "--force")] == [listed["lab"]]
        assert room.names() == []
        assert process.communicate("\n", timeout=30) == ("", "")
        assert process.returncode == 0, "its own removal finds nothing and is content"
    room.run(sys.executable, "-c", HELD.replace("input()", "import os; os._exit(0)"))
    assert room.json("status")[0]["alive"] is False
    assert len(room.json("down")) == 1


@needs_lab
@needs_room
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "terminate"])
def test_a_signal_while_it_is_built_leaves_nothing(room: Room, number: signal.Signals) -> None:
    with room.start(*COMMAND, "lab", "up", "--ranks", 200) as process:
        until = time.monotonic() + 60
        while len(room.names()) < 5:
            assert process.poll() is None
            assert time.monotonic() < until
        os.killpg(process.pid, number)  # as a terminal does: to ip, too
        os.killpg(process.pid, number)
        out, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert (out, room.names()) == ("", [])
    assert "Traceback" not in said


@needs_lab
@needs_room
def test_what_a_killed_up_left_is_shown_as_not_whole_and_can_be_taken_down(room: Room) -> None:
    with room.start(*COMMAND, "lab", "up", "--ranks", 200) as process:
        while len(room.names()) < 5:
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
    (listed,) = room.json("status")
    assert (listed["whole"], listed["link_gb_s"]) == (False, None)
    assert "lab lab1 is not whole" in room.refused("fault", "--cut", 0)
    assert "lab lab1: kept, " in room.megamoe("status").stdout
    room.json("down")
    assert room.names() == []


WRONG = [
    (["up", "--name", "Blue"], "name 'Blue' is not of small letters, digits and hyphens"),
    (["up", "--name", "7-7-7"], "name '7-7-7' is not of small letters, digits and hyphens"),
    (["up", "--ranks", "0"], "a lab holds 1 to 250 ranks, got 0"),
    (["up", "--link", "fast"], "link 'fast' is not a rate"),
    (["up", "--format", "xml"], "Invalid value for '--format'"),
    (["down", "one", "--all"], "--all takes down 'one' too"),
    (["fault"], "give one of --cut RANK, --slow RANK RATE, --heal RANK"),
    (["fault", "--cut", "0", "--heal", "0"], "give one of"),
    (["fault", "--cut", "2"], "lab one has ranks 0 to 1, there is no rank 2"),
    (["fault", "--cut", "-1"], "there is no rank -1"),
    (["fault", "--heal", "x"], "Invalid value for '--heal'"),
    (["fault", "--slow", "1", "slowly"], "rate 'slowly' is not a rate such as 1gbit"),
    (["fault", "--slow", "1", "2gbit"], "rate 2gbit does not slow rank 1 down: the lab's links have 1gbit"),
    (["fault", "--lab", "two", "--cut", "1"], "no lab is called 'two'; there is one"),
]
ASKED = """
import json, sys
from tests.commands import refused
print(json.dumps([refused("lab", *arguments) for arguments in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def refusals() -> Iterator[list[str]]:
    """What is said of each wrong request where a lab stands: all asked in one process, one after another."""
    with a_room() as room:
        room.json("up", "--name", "one")
        done = room.run(sys.executable, "-c", ASKED, json.dumps([arguments for arguments, _ in WRONG]))
        assert done.returncode == 0, done.stderr
        assert room.names() == ["megamoe-one-r0", "megamoe-one-r1", "megamoe-one-switch"], "nothing was done"
        yield json.loads(done.stdout)


@needs_lab
@needs_room
@pytest.mark.parametrize("number", range(len(WRONG)), ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_wrong_request_exits_with_2(refusals: list[str], number: int) -> None:
    assert WRONG[number][1] in refusals[number]


@needs_lab
@needs_room
def test_without_a_lab_there_is_none_to_fault_or_take_down(room: Room) -> None:
    for arguments in (["down"], ["down", "one"], ["fault", "--cut", "0"]):
        assert "no lab stands on this machine: megamoe lab up makes one" in room.refused(*arguments)
    done = room.megamoe("status")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no lab stands" in done.stderr


@pytest.mark.parametrize("arguments", [["up"], ["status"], ["down"], ["fault", "--cut", "0"]], ids=lambda each: each[0])
def test_where_there_can_be_no_lab_every_command_says_why(tmp_path: Path, arguments: list[str]) -> None:
    done = command("lab", *arguments, PATH=str(tmp_path), COLUMNS="200")
    assert done.returncode == 2, done.stderr
    assert "shaped links need " in done.stderr


@needs_lab
def test_the_command_faults_the_lab_of_another_process() -> None:
    def fault(*arguments: object) -> dict[str, Any]:
        done = command("lab", "fault", "--lab", run, *arguments, "--format", "json")
        assert done.returncode == 0, done.stderr
        return {key: each for key, each in json.loads(done.stdout).items() if key in ("rank", "link_gb_s", "faults")}

    with lab(3, "200mbit") as hosts:
        run = str(hosts[0].lab)
        assert fault("--slow", 2, "8mbit") == {"rank": 2, "link_gb_s": 0.001, "faults": ["slow"]}
        assert fault("--cut", 2) == {"rank": 2, "link_gb_s": 0.001, "faults": ["cut", "slow"]}
        assert fault("--heal", 2) == {"rank": 2, "link_gb_s": 0.025, "faults": []}
