"""Workers on Ray: they meet, fail and end like any others, and a cluster that was started for them leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import IO, Any

import pytest

from megamoe.launch.cluster.ray.pool import RayPool
from megamoe.launch.cluster.worker_handle import WorkerLostError
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup

pytest.importorskip("ray")

from ray import cloudpickle

from megamoe.launch.cluster.ray import session
from megamoe.launch.cluster.ray.actor import WorkerActor, WorkerOrder, end_process
from megamoe.launch.cluster.ray.handle import RayHandle
from megamoe.launch.cluster.ray.placement import Placement, order_bundles
from tests.ray_nodes import add_up, is_gone, meet, nap, two_nodes

WAIT_S = 60.0
CAN_HOLD_A_LAB = sys.platform.startswith("linux") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")

DRIVER = """
import json, os, psutil, signal, sys
from pathlib import Path
from megamoe.launch.cluster.ray.pool import RayPool

def speak(group, text):
    print("to stdout:", text)
    print("to stderr:", text, file=sys.stderr)

from megamoe.launch.cluster.worker import Rendezvous
with RayPool(2, address="local", log_dir=Path(sys.argv[1])) as workers:
    for number in range(2):
        worker = workers.open(number, 60.0)
        worker.call("join", Rendezvous(*worker.call("open_store").result(60.0), 0, 0, 1)).result(60.0)
        worker.call("run", speak, f"from {number}").result(60.0)
    os.kill(worker.pid, signal.SIGKILL)
    seen = {
        "pids": [process.pid for process in psutil.Process().children(recursive=True)],
        "place": str(Path(workers.log_paths()[0].path).parents[2]),
    }
    sys.stdin.readline()
Path(sys.argv[1], "seen.json").write_text(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def places() -> Iterator[RayPool]:
    """Two workers on a cluster of this machine."""
    with RayPool(2, address="local", deadline_s=60.0) as handles:
        yield handles


@pytest.fixture(scope="module")
def pair(places: RayPool) -> list[RayHandle]:
    return [places.open(number, WAIT_S) for number in range(2)]


def raise_value_error(group: EPGroup) -> None:
    raise ValueError(f"hidden 7 on rank {group.rank} is odd")


def raise_peer_error(group: EPGroup) -> None:
    raise PeerError(1 - group.rank, "there", "dispatch", "layer", 2, 1.5, 1.0, "reset")


def raise_what_cannot_travel(_: EPGroup) -> None:
    error = RuntimeError("holds a socket")
    error.held = socket.socket()  # type: ignore[attr-defined]
    raise error


def answer_what_cannot_travel(_: EPGroup) -> socket.socket:
    return socket.socket()


def test_workers_meet_as_a_group_and_meet_again(pair: list[RayHandle]) -> None:
    for generation in (1, 2):
        meet(pair, generation)
        summing = [handle.call("run", add_up, 10) for handle in pair]
        assert [each.result(timeout=WAIT_S) for each in summing] == [21.0, 21.0]


def test_workers_have_the_right_to_the_cpu_of_any_process(pair: list[RayHandle]) -> None:
    assert [os.getpriority(os.PRIO_PROCESS, handle.pid) for handle in pair] == [os.getpriority(os.PRIO_PROCESS, 0)] * 2


def test_errors_arrive_as_they_were_raised_with_where_in_a_note(pair: list[RayHandle]) -> None:
    meet(pair, 3)
    wrong = pair[1].call("run", raise_value_error).exception(timeout=WAIT_S)
    assert type(wrong) is ValueError
    assert str(wrong) == "hidden 7 on rank 1 is odd"
    assert "raise_value_error" in getattr(wrong, "__notes__", [""])[0]
    lost = pair[0].call("run", raise_peer_error).exception(timeout=WAIT_S)
    assert isinstance(lost, PeerError)
    assert (lost.rank, lost.wave, lost.reason) == (1, 2, "reset")
    assert "raised on rank 0" in getattr(lost, "__notes__", [""])[0]


@pytest.mark.parametrize("work", [raise_what_cannot_travel, answer_what_cannot_travel])
def test_what_cannot_travel_is_said_and_the_worker_serves_on(pair: list[RayHandle], work: Any) -> None:
    meet(pair, 4)
    error = pair[0].call("run", work).exception(timeout=WAIT_S)
    assert isinstance(error, RuntimeError)
    assert "socket" in str(error)
    assert pair[0].call("info").result(timeout=WAIT_S).pid == pair[0].pid


def test_a_killed_process_is_noticed_at_once_and_its_worker_opens_again(places: RayPool) -> None:
    handles = [places.open(number, WAIT_S) for number in range(2)]
    meet(handles, 5)
    asked = handles[1].call("run", nap)
    begin = time.monotonic()
    os.kill(handles[1].pid, signal.SIGKILL)
    lost = asked.exception(timeout=WAIT_S)
    assert time.monotonic() - begin < 3.0
    assert isinstance(lost, WorkerLostError)
    assert lost.number == 1
    assert f"process {handles[1].pid}" in lost.message
    assert "killed" in lost.message
    assert not handles[1].alive
    again = places.open(1, WAIT_S)
    assert again.alive
    assert again.call("info").result(timeout=WAIT_S).pid == again.pid != handles[1].pid


def test_a_stopped_process_can_be_ended_and_what_it_was_asked_fails(places: RayPool) -> None:
    handle = places.open(0, WAIT_S)
    os.kill(handle.pid, signal.SIGSTOP)
    asked = handle.call("info")
    handle.kill()
    assert is_gone(handle.pid)
    assert not handle.alive
    assert isinstance(asked.exception(timeout=0.0), WorkerLostError)
    assert isinstance(handle.call("info").exception(timeout=WAIT_S), WorkerLostError)


def test_a_cluster_without_room_says_what_was_asked_and_what_it_has(places: RayPool) -> None:
    import ray

    places.place()
    with pytest.raises(RuntimeError, match=r"no room within 0\.5 s for 3 bundles of 1 CPU: the cluster has 2 CPU;"):
        RayPool(3, deadline_s=0.5).place()
    with pytest.raises(RuntimeError, match=r"2 bundles of 1 GPU: the cluster has 0 GPU; node [0-9.]+ has 0, 0 of them"):
        RayPool(2, device="cuda", deadline_s=0.5).place()
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"there is no room for 2 bundles of 1 GPU: the cluster has 0 GPU"):
        Placement(2, "GPU").reserve(600.0, grows=False)
    assert time.monotonic() - begin < 10.0
    states = [each["state"] for each in ray.util.placement_group_table().values()]
    assert "PENDING" not in states


def test_a_process_uses_one_cluster(places: RayPool) -> None:
    places.place()
    with pytest.raises(RuntimeError, match=r"cannot use 198\.51\.100\.1:6379 besides"):
        RayPool(1, address="198.51.100.1:6379").place()


def test_an_address_without_a_cluster_is_refused_within_the_deadline() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=f"no Ray cluster answers at {address}: Connection refused"):
            session.check_cluster(address, 2.0)
        silent.listen()
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="did not answer as a Ray cluster within 2 s"):
            session.check_cluster(address, 2.0)
        assert time.monotonic() - begin < 4.0


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "ray://head"])
def test_an_address_needs_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        session.check_cluster(address, 1.0)


def test_a_ray_that_does_not_start_is_said_in_a_line_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.")  # the type that Ray raises on a busy machine

    there = set(Path("/tmp").glob("megamoe-ray-*"))
    monkeypatch.setattr("ray.init", fails)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)  # of the cluster that other tests have
    with pytest.raises(RuntimeError, match="Ray does not start on this machine: The current node timed out"):
        session.connect("local", 2, 10.0)
    assert set(Path("/tmp").glob("megamoe-ray-*")) <= there


_WRITES = """
import os, sys, uuid
while True:
    os.makedirs(folder := os.path.join(sys.argv[1], "logs", uuid.uuid4().hex), exist_ok=True)
"""


def test_what_a_failed_start_leaves_running_ends_and_its_folder_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the process that started it has ended before it, as Ray's own agents outlive what started them."""
    places: list[str] = []

    def fails(*_: object, _temp_dir: str, **__: object) -> None:
        places.append(_temp_dir)
        line = [sys.executable, "-c", _WRITES, _temp_dir, str(Path(str(sys.modules["ray"].__file__)).parent / "agent")]
        start = f'"$@" & until [ -d {_temp_dir}/logs ]; do sleep 0.01; done'
        subprocess.run(["sh", "-c", start, "sh", *line], check=True, timeout=WAIT_S)
        raise RuntimeError("no port is free")

    monkeypatch.setattr("ray.init", fails)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(session, "STOP_S", 0.1)
    with pytest.raises(RuntimeError, match="Ray does not start on this machine: no port is free"):
        session.connect("local", 2, 10.0)
    assert not Path(places[0]).exists()
    assert not session.processes_of(Path(places[0]))


_HOLDS = """
import sys, tempfile
from pathlib import Path
tempfile.tempdir = sys.argv[1]
from megamoe.launch.cluster.ray import session
session.os.access = lambda *_: False
own = session.OwnPlace()
print(own.path, flush=True)
sys.stdin.read()
"""


def test_the_folder_of_a_driver_that_was_killed_goes_with_the_next_start(tmp_path: Path) -> None:
    drivers = [
        subprocess.Popen([sys.executable, "-c", _HOLDS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        places = [Path(driver.stdout.readline().decode().strip()) for driver in drivers if driver.stdout]
        (tmp_path / "megamoe-ray-of-others").mkdir()
        drivers[0].kill()
        drivers[0].wait(WAIT_S)
        assert all(place.is_dir() for place in places)
        session.sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([places[1], tmp_path / "megamoe-ray-of-others"])
    finally:
        for driver in drivers:
            driver.kill()
            driver.communicate(timeout=WAIT_S)


def test_a_full_disk_where_a_cluster_begins_is_said_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "driver")

    there = set(Path("/tmp").glob("megamoe-ray-*"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("fcntl.flock", full)
    with pytest.raises(RuntimeError, match=r"Ray does not start on this machine: .*No space left on device"):
        session.connect("local", 2, 10.0)
    assert set(Path("/tmp").glob("megamoe-ray-*")) <= there


def test_a_signal_waits_until_ray_knows_of_all_that_it_has_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ray.shutdown() overlooks crashes this process at its end."""
    happened: list[str] = []

    def strikes(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)
        happened.append("started")

    def ends(*_: object) -> None:
        happened.append("ended by the signal")
        raise KeyboardInterrupt

    monkeypatch.setattr("ray.init", strikes)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: happened.append("stopped"))
    before = signal.signal(signal.SIGINT, ends)
    try:
        with pytest.raises(KeyboardInterrupt):
            session.connect("local", 2, 10.0)
        assert signal.getsignal(signal.SIGINT) is ends
    finally:
        signal.signal(signal.SIGINT, before)
    assert happened == ["started", "ended by the signal", "stopped"]


def test_a_connection_outlasts_a_worker_that_is_being_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its calls to Ray crash this process, or start a cluster that nobody ends: as after Ctrl-C at the start."""
    opening, released, closed = Event(), Event(), Event()

    def opens(*_: object) -> None:
        opening.set()
        assert released.wait(WAIT_S)
        raise RuntimeError(f"the connection was {'closed' if closed.wait(0.2) else 'open'}")

    placement = SimpleNamespace(reserve=lambda *_, **__: None, release=released.set, num_workers_beside=lambda _: 1)
    monkeypatch.setattr(session, "connect", lambda *_: SimpleNamespace(place=None, close=closed.set))
    monkeypatch.setattr("megamoe.launch.cluster.ray.placement.Placement", lambda *_: placement)
    monkeypatch.setattr("megamoe.launch.cluster.ray.handle.open_worker", opens)
    workers = RayPool(1)
    with ThreadPoolExecutor() as threads:
        opened = threads.submit(workers.open, 0, WAIT_S)
        assert opening.wait(WAIT_S)
        workers.close()
    assert closed.is_set()
    assert str(opened.exception(0)) == "the connection was open"
    with pytest.raises(RuntimeError, match="have been closed"):
        workers.open(0, WAIT_S)


def test_what_ray_sends_a_process_first_needs_no_module_of_this_package(tmp_path: Path) -> None:
    """Ray has a process look for modules in the driver's folder first, where a user's megamoe.py may lie."""
    (tmp_path / "megamoe.py").write_text("raise SystemExit('a script of the user')")
    order = WorkerOrder("cpu", 1, None, WAIT_S, None)
    (tmp_path / "sent").write_bytes(cloudpickle.dumps((WorkerActor, order, end_process)))
    program = "import pickle, sys; actor, order, _ = pickle.load(open('sent', 'rb')); print(actor(3), order.device)"
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.stderr == "rank 3 cpu\n", "the actor's stdout is stderr"


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'megamoe\[ray\]'"):
        RayPool(2)
    alone = "import sys; sys.modules['ray'] = None; import megamoe.launch.cluster.ray.pool"
    subprocess.run([sys.executable, "-c", alone], check=True, timeout=WAIT_S)


@pytest.mark.parametrize(
    ("first", "order"),
    [("x", [1, 3, 0, 2]), ("b", [0, 2, 1, 3]), ("a", [1, 3, 0, 2])],
    ids=["driver_elsewhere", "driver_on_b", "driver_on_a"],
)
def test_workers_of_a_node_follow_each_other(first: str, order: list[int]) -> None:
    nodes = {0: "b", 1: "a", 2: "b", 3: "a"}
    assert order_bundles(nodes, {"a": "10.0.0.9", "b": "10.0.0.10"}, first) == order


def _read(stream: IO[str], lines: list[str], wanted: dict[Event, list[str]]) -> None:
    """Reads to the end of the stream, and sets each event as soon as all that it waits for has come."""
    for line in stream:
        lines.append(line)
        for event, texts in wanted.items():
            if all(any(text in each for each in lines) for text in texts):
                event.set()


def test_a_local_cluster_leaves_stdout_alone_and_nothing_behind_but_logs(tmp_path: Path) -> None:
    line = [sys.executable, "-c", DRIVER, str(tmp_path)]
    spoken = [f"to {stream}: from {number}" for number in range(2) for stream in ("stdout", "stderr")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ThreadPoolExecutor() as threads, subprocess.Popen(line, text=True, **pipes) as driver:  # type: ignore[call-overload]
        try:
            lines: list[str] = []
            said, of_killed = Event(), Event()
            reading = threads.submit(_read, driver.stderr, lines, {said: spoken, of_killed: ["(raylet)"]})
            assert said.wait(WAIT_S), lines
            of_killed.wait(10.0)  # Ray does not always say what was killed
            driver.stdin.write("\n")
            driver.stdin.close()
            assert driver.wait(WAIT_S) == 0, lines
            stdout = driver.stdout.read()
            reading.result(WAIT_S)
        finally:
            driver.kill()
    heard = "".join(lines)
    assert stdout == ""
    for number, kept in enumerate((spoken[:2], spoken[2:])):
        assert all(re.search(rf"^\(rank {number} pid=\d+\) {each}$", heard, re.MULTILINE) for each in kept)
        assert (tmp_path / f"worker-{number}.log").read_text().splitlines() == kept
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert not Path(seen["place"]).exists()
    assert len(seen["pids"]) > 4
    assert [pid for pid in seen["pids"] if not is_gone(pid)] == []


@pytest.mark.soak  # the suite has two nodes in test_cluster_ray.py
@pytest.mark.skipif(not CAN_HOLD_A_LAB, reason="two networks on one machine need Linux, root, ip and tc")
def test_workers_on_two_nodes() -> None:
    with two_nodes() as nodes:
        head, other = (host.address for host in nodes.hosts)
        done = nodes.python("-m", "tests.ray_nodes", nodes.address, timeout_s=120.0)
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
    assert seen["nodes"] == [head, head, other, other]
    assert seen["logs_exist"] == [True] * 4
    assert seen["sums"] == [46.0] * 4
    full = f"the cluster has 4 CPU; node {head} has 2, 0 of them free; node {other} has 2, 0 of them free"
    assert f"1 bundles of 1 CPU: {full}" in seen["too_small"]
    assert seen["stopped_is_gone"]
    assert seen["stopped_s"] < 15.0
    assert seen["stopped_call"] == "WorkerLostError"
    assert seen["node_lost"].startswith("WorkerLostError: rank 3")
    assert "its node is gone, and no other has 1 CPU free" in seen["homeless"]
