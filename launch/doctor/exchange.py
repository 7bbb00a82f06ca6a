"""What only ranks can find out: whether they reach each other by a backend, and what passes between every two."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megamoe.catalog.wording import plural
from megamoe.launch.devices import DeviceType, device_of, device_type, num_devices
from megamoe.launch.doctor.check import Check, Examination, Link
from megamoe.launch.doctor.links import Line, measure
from megamoe.launch.lab.namespaces import Host
from megamoe.launch.process import LOOPBACK_UP
from megamoe.launch.ranks import LocalRanks
from megamoe.launch.requests import check_system
from megamoe.parallel.group import BACKENDS, EPGroup
from megamoe.parallel.interfaces import choose

_NUMBERS = 1024
_RANKS_WAIT = 0.5  # of what is left, so that who waits in vain says so before the ranks are stopped, and is not blamed
_LINKS_TAKE = 0.25


@dataclass(frozen=True, slots=True)
class Trial:
    """What a rank needs to know to try a backend.

    device      device type whose backend it is
    interface   network interface that the backend is to use
    wait_s      bound on every single wait
    links_s     how long to measure links for, 0 for not at all
    """

    device: str
    interface: str
    wait_s: float
    links_s: float


TryOut = Callable[[EPGroup, Trial], list[Link]]


def try_backend(group: EPGroup, trial: Trial) -> list[Link]:
    """On every rank: a message around the ring, an all-reduce, then the links that start at this rank.

    RuntimeError where something does not arrive or is not what was sent. Messages go first: gloo does not let a rank
    leave while a collective waits for a peer, so that the rank which is missing could not be told from the others.
    """
    kind, device = device_type(trial.device), torch.device(device_of(trial.device, group.rank))
    wait = timedelta(seconds=trial.wait_s)
    world = _world(kind, trial, device, wait)
    ranks = torch.full((_NUMBERS,), float(group.rank), device=device)
    if group.size > 1:
        before, after, received = (group.rank - 1) % group.size, (group.rank + 1) % group.size, torch.empty_like(ranks)
        operations = [dist.P2POp(dist.isend, ranks, after, world), dist.P2POp(dist.irecv, received, before, world)]
        for each in dist.batch_isend_irecv(operations):
            each.wait(wait)
        _expect(f"a message from rank {before}", received, float(before))
    work = dist.all_reduce(ranks, group=world, async_op=True)
    assert work is not None
    work.wait(wait)
    _expect("an all-reduce", ranks, group.size * (group.size - 1) / 2)
    alone = group.size == 1 or not trial.links_s
    return [] if alone else measure(Line(world, device, wait), group.rank, group.size, trial.links_s)


def exchange(examination: Examination, work: TryOut = try_backend) -> tuple[list[Check], list[Link]]:
    """A check for every backend and one for the links, and the links over the backend that ranks will use.

    work is what every rank does; whatever becomes of it, this returns within about deadline_s for each backend tried.
    """
    if not examination.exchange:
        return [Check.ok(name, "not tried: --no-exchange") for name in (*BACKENDS.values(), "links")], []
    checks, links = [], list[Link]()
    for name in BACKENDS:
        why_not = _not_tried(name, examination)
        if why_not is not None:
            checks.append(why_not)
            continue
        check, found = _tried(name, examination, work)
        checks.append(check)
        links = found or links  # an accelerator's, which come after the CPU's
    return [*checks, _links(links, examination)], links


def _not_tried(name: str, examination: Examination) -> Check | None:
    """Why a device type's backend is not tried, if it is not. gloo always is: ranks meet by it everywhere."""
    backend, wanted = BACKENDS[name], name in ("cpu", examination.device)
    if not dist.is_backend_available(backend) and wanted and num_devices(name):
        fix = f"install a torch built with {backend}: https://pytorch.org/get-started/locally"
        return Check(backend, "fail", "this torch was built without it", fix)
    if not num_devices(name):
        return Check.ok(backend, f"not tried: no {name} device")
    if not wanted:
        return Check.ok(backend, f"not tried: --device {examination.device}")
    try:
        check_system()
    except ValueError as refusal:
        return Check(backend, "warn", f"not tried: {refusal}", "run it in WSL: wsl --install")
    return None


def _tried(name: str, examination: Examination, work: TryOut) -> tuple[Check, list[Link]]:
    """Starts ranks, has them try a device type's backend, and ends them."""
    until = time.monotonic() + examination.deadline_s
    size = examination.ranks if name == "cpu" else min(examination.ranks, num_devices(name))
    backend, measured = BACKENDS[name], name == examination.device
    try:
        interface = choose(name=examination.interface)
    except ValueError as nowhere:
        return Check(backend, "fail", str(nowhere), LOOPBACK_UP), []
    hosts = [Host(None, interface.address, interface.name)] * size
    try:
        with LocalRanks(size, threads_per_rank=1, deadline_s=examination.deadline_s, hosts=hosts) as ranks:
            left = max(0.1, until - time.monotonic())
            trial = Trial(name, interface.name, left * _RANKS_WAIT, left * _LINKS_TAKE if measured else 0.0)
            links = ranks.run(work, trial, timeout_s=left)
    except Exception as failure:  # noqa: BLE001  whatever became of a rank is what was to be found out
        return Check(backend, "fail", _first_line(failure), _fix(interface.name, examination)), []
    took = examination.deadline_s - (until - time.monotonic())
    found = f"all-reduce{' and messages' if size > 1 else ''} between {plural(size, 'rank')} on {interface.name}"
    if size == 1:
        found = "all-reduce of 1 rank, which shows little"
    return Check.ok(backend, f"{found}, {took:.1f} s with their start"), [link for each in links for link in each]


def _links(links: Sequence[Link], examination: Examination) -> Check:
    if not links:
        return Check.ok("links", "not measured: " + ("one rank has none" if examination.ranks == 1 else "see above"))
    slowest, latest = min(link.gb_s for link in links), max(link.latency_us for link in links)
    found = f"{plural(len(links), 'link')} over {BACKENDS[examination.device]}, slowest {slowest:.2f} GB/s"
    return Check.ok("links", f"{found}, latency up to {latest:.0f} us")


def _world(kind: DeviceType, trial: Trial, device: torch.device, wait: timedelta) -> dist.ProcessGroup:
    """All ranks by the device type's backend: gloo has joined them already."""
    if device.type == "cpu":
        world = dist.group.WORLD
        assert world is not None
        return world
    os.environ.update(kind.interface_setting(trial.interface))  # this process is a rank's, and its backend reads them
    torch.get_device_module(device.type).set_device(device)
    made: dist.ProcessGroup = dist.new_group(backend=kind.backend, timeout=wait)
    return made


def _expect(what: str, found: torch.Tensor, value: float) -> None:
    wrong = found.cpu() != value
    if wrong.any():
        raise RuntimeError(f"{what} brought {found.cpu()[wrong][0]:g} where {value:g} was sent")


def _fix(interface: str, examination: Examination) -> str:
    """What to try, the likeliest first: a busy machine is slow to start ranks, and a wrong interface goes nowhere."""
    longer = f"megamoe doctor --deadline-s {3 * examination.deadline_s:g}"
    return f"{longer}, where ranks are slow to start; --interface NAME, where a firewall closes {interface}"


def _first_line(failure: BaseException) -> str:
    text = str(failure).strip()
    return text.splitlines()[0] if text else type(failure).__name__
