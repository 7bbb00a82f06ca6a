"""The lab: links of the bandwidth asked for, taken down however it ends, and swept where it was killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from megamoe.launch.lab import NAMESPACES, Host, burst_bytes, check_lab, lab, parse_rate, runs, sweep
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport import Label
from megamoe.shape import MoEShape
from tests.cases import make_batch, oracle, split
from tests.test_layer import forward


def possible() -> str:
    """Why this machine can hold no lab; "" where it can."""
    try:
        check_lab()
        with lab(1, "1gbit"):
            return ""
    except (ValueError, RuntimeError) as refusal:
        return str(refusal)


WHY_NOT = possible()
needs_lab = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.mark.parametrize(("text", "bits"), [("1gbit", 1e9), ("2.5Gbit", 2.5e9), ("500mbit", 5e8), ("64kbit", 64e3)])
def test_rates_are_read_as_tc_writes_them(text: str, bits: float) -> None:
    assert parse_rate(text) == bits


@pytest.mark.parametrize("text", ["", "1", "gbit", "1gbps", "-1gbit", "0gbit", "1 gbit x"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate such as 1gbit"):
        parse_rate(text)


def names(run_hosts: list[Host]) -> set[str]:
    return {host.namespace or "" for host in run_hosts}


@needs_lab
def test_two_labs_stand_side_by_side_and_nothing_is_left() -> None:
    with lab(2, "1gbit") as one, lab(3, "100mbit") as other:
        assert not names(one) & names(other)
        assert len(runs()) >= 2
        assert all((NAMESPACES / name).exists() for name in names(one) | names(other))
    assert not any((NAMESPACES / name).exists() for name in names(one) | names(other))


@needs_lab
def test_a_lab_is_taken_down_when_its_block_raises() -> None:
    with pytest.raises(KeyError), lab(1, "1gbit") as hosts:
        raise KeyError
    assert not any((NAMESPACES / name).exists() for name in names(hosts))


KILLED = """
import time
from megamoe.launch.lab import lab
with lab(2, "1gbit") as hosts:
    print(hosts[0].namespace, flush=True)
    time.sleep(60)
"""


@needs_lab
def test_the_next_start_sweeps_what_a_killed_one_left() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        run = name.rpartition("-")[0]
        assert run in runs()
        assert run not in sweep(), "a lab whose process lives is left alone"
        process.send_signal(signal.SIGKILL)
    assert run in sweep()
    assert not list(NAMESPACES.glob(f"{run}-*"))


def transfer(group: EPGroup, num_bytes: int) -> float:
    """Seconds that num_bytes take to the other rank and, at the same time, back; the second time, when links are up."""
    assert group.transport is not None
    counts = [int(rank != group.rank) for rank in range(2)]
    out, back = torch.ones(1, num_bytes, dtype=torch.uint8), torch.zeros(1, num_bytes, dtype=torch.uint8)
    took = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        moving = group.transport.expect(back, counts, Label("lab", "dispatch", 0))
        moving.send(out, counts)
        moving.wait()
        moving.finish()
        took = time.perf_counter() - begun
    assert torch.equal(out, back)
    return took


@needs_lab
def test_both_directions_have_the_bandwidth_asked_for() -> None:
    num_bytes = 5_000_000
    with lab(2, "200mbit") as hosts, LocalRanks(2, threads_per_rank=1, hosts=hosts) as ranks:
        seconds = max(ranks.run(transfer, num_bytes))
    at_once = burst_bytes(200e6)
    assert 0.95 * (num_bytes - at_once) * 8 / 200e6 < seconds < 1.5 * num_bytes * 8 / 200e6


@needs_lab
def test_the_layer_gives_the_oracles_bits_over_shaped_links() -> None:
    shape = MoEShape(128, 96, 10, 4, 3.0)
    batch = make_batch(shape, 61)
    with lab(3, "50mbit") as hosts, LocalRanks(3, threads_per_rank=1, hosts=hosts) as ranks:
        parts = ranks.run(forward, shape, batch, split(61, 3), 3)
    assert torch.equal(torch.cat(parts), oracle(shape, batch, "mxfp4", "mxfp8"))


@needs_lab
def test_a_delay_is_real_or_refused_by_name() -> None:
    said = ""
    try:
        with lab(2, "1gbit", latency_ms=20) as hosts, LocalRanks(2, threads_per_rank=1, hosts=hosts) as ranks:
            assert max(ranks.run(transfer, 100)) > 0.02
    except ValueError as refusal:
        said = str(refusal)
    assert not said or "latency_ms 20 needs the kernel module sch_netem" in said
    assert not [run for run in runs() if f"-{os.getpid()}-" in run]


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="need Linux network namespaces, this is darwin"):
        check_lab()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    with pytest.raises(ValueError, match="need tc: install iproute2"):
        check_lab()
    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="need root"):
        check_lab()


@pytest.mark.parametrize(
    ("arguments", "latency_ms", "message"),
    [
        ((0, "1gbit"), 0, "a lab holds 1 to 250 ranks, got 0"),
        ((251, "1gbit"), 0, "got 251"),
        ((2, "fast"), 0, "link 'fast' is not a rate"),
        ((2, "1gbit"), -1, "latency_ms must not be negative, got -1"),
    ],
)
def test_wrong_labs_are_refused(arguments: tuple[int, str], latency_ms: float, message: str) -> None:
    with pytest.raises(ValueError, match=message), lab(*arguments, latency_ms=latency_ms):
        pass
