"""What only an accelerator does, held on made-up ones: messages queued and lost, copies, devices, teardown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed import distributed_c10d

from megamoe.execution.checks import check_device, check_input
from megamoe.launch.cluster.worker import Worker, WorkerOptions
from megamoe.layer import MegaMoE
from megamoe.model.router import Router
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.health.status import OwnStatus
from megamoe.parallel.streams import make_current, on_device, synchronize
from megamoe.parallel.transport import all_to_all
from megamoe.parallel.transport.all_to_all import AllToAllTransport
from megamoe.parallel.transport.pairs import Clock, Label
from megamoe.parallel.transport.process_group import backend_timeout_s, end_group
from megamoe.parallel.workspace import Workspace
from megamoe.routing.segments import to_host
from megamoe.shape import MoEShape

LABEL = Label("moe", "dispatch", 0)


class QueuedWork:
    """A work as NCCL has it: wait() only queues, so it returns at once, whether or not anything has come."""

    def __init__(self) -> None:
        self.done, self.broken = False, False

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.done


class Queue:
    """A process group whose collectives are queued. deliver is called with what is gathered into, and what of."""

    def __init__(self) -> None:
        self.works: list[QueuedWork] = []
        self.aborts = 0
        self.deliver: Callable[[Tensor, Tensor], bool] = self.all_come

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 3

    def _get_backend(self, device: torch.device) -> Queue:
        assert device.type == "cuda", "the backends for other devices have no part in it"
        return self

    def abort(self) -> None:
        """All that is queued ends, and nothing says that it did not arrive."""
        self.aborts += 1
        for work in self.works:
            work.done = True

    def all_come(self, pages: Tensor, mine: Tensor) -> bool:
        rows = pages.view(self.size(), -1)
        rows.copy_(mine)
        rows[:, -8:] = (torch.arange(self.size())[:, None] + AllToAllTransport._MARK).view(torch.uint8)
        return True

    def gather(self, pages: Tensor, mine: Tensor, **_: Any) -> QueuedWork:
        self.works.append(QueuedWork())
        self.works[-1].done = self.deliver(pages, mine)
        return self.works[-1]

    def exchange(self, *_: Any, **__: Any) -> QueuedWork:
        self.works.append(QueuedWork())
        return self.works[-1]


class OnCuda:
    """A device that is taken for CUDA, and where tensors can be had all the same."""

    type = "cuda"


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue()
    monkeypatch.setattr(all_to_all, "_gather", made.gather)
    monkeypatch.setattr(dist, "all_to_all_single", made.exchange)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *_: tensor)
    return made


@pytest.fixture
def transport(queue: Queue) -> AllToAllTransport:
    clock = Clock(0.2, {1: "h1", 2: "h2"}, OwnStatus())
    return AllToAllTransport(queue, clock, OnCuda())  # type: ignore[arg-type]


PAGE = torch.arange(5, dtype=torch.uint8)


def group_of(transport: AllToAllTransport) -> EPGroup:
    return EPGroup(0, 3, transport, 0.2, transport.clock)


# ---- a queue of messages ----


def test_pages_come_without_their_marks_in_one_collective(transport: AllToAllTransport, queue: Queue) -> None:
    assert torch.equal(transport.gather(PAGE, LABEL), PAGE.expand(3, -1))
    assert len(queue.works) == 1


def test_a_page_that_never_came_is_no_page_of_another_version(transport: AllToAllTransport, queue: Queue) -> None:
    def one_is_missing(pages: Tensor, mine: Tensor) -> bool:
        queue.all_come(pages, mine)
        pages.view(3, -1)[2] = 0
        return True

    queue.deliver = one_is_missing
    group = group_of(transport)
    with pytest.raises(PeerError, match="ended without rank 2's page") as lost, group.unbroken("moe", 1):
        transport.gather(PAGE, LABEL)
    assert lost.value.rank == 2
    assert group.broken, "rows may be on their way"


def test_an_exchange_that_is_aborted_raises_though_its_wait_returns(transport: AllToAllTransport, queue: Queue) -> None:
    queue.deliver = lambda *_: False
    threading.Timer(0.05, transport.abort).start()
    begun = time.monotonic()
    with pytest.raises(PeerError, match="broken off"):
        transport.gather(PAGE, LABEL)
    assert time.monotonic() - begun < 0.19
    assert queue.aborts == 1
    with pytest.raises(PeerError, match="broken off"):
        transport.gather(PAGE, LABEL)


def test_an_exchange_that_nobody_answers_ends_at_the_deadline(transport: AllToAllTransport, queue: Queue) -> None:
    queue.deliver = lambda *_: False
    begun = time.monotonic()
    with pytest.raises(PeerError, match=r"no answer within 0\.2 s"):
        transport.gather(PAGE, LABEL)
    assert 0.15 < time.monotonic() - begun < 1.0
    assert queue.aborts == 0, "a group that may be the user's is not aborted"


@pytest.mark.parametrize("step", ["send", "wait", "finish"])
def test_rows_of_an_aborted_queue_are_not_taken_for_rows(transport: AllToAllTransport, step: str) -> None:
    transfer = transport.expect(torch.empty(3), [1, 1, 1], LABEL)
    steps = {"send": lambda: transfer.send(torch.empty(3), [1, 1, 1]), "wait": transfer.wait, "finish": transfer.finish}
    for each, do in steps.items():
        if each == step:
            transport.abort()
            with pytest.raises(PeerError, match="broken off"):
                do()
            return
        do()


@pytest.mark.parametrize("broken", [False, True], ids=["late", "failed"])
def test_rows_that_are_queued_are_looked_after_while_the_call_goes_on(
    transport: AllToAllTransport, queue: Queue, broken: bool
) -> None:
    transport.clock.monitors.append(mock.Mock())
    for _ in range(3):
        transport.expect(torch.empty(3), [1, 1, 1], LABEL).send(torch.empty(3), [1, 1, 1])
    transport.tend()
    queue.works[0].done = True
    transport.tend()
    assert not transport.aborted
    queue.works[1].broken = broken
    if not broken:
        with mock.patch("time.monotonic", return_value=time.monotonic() + 0.3):
            transport.tend()
    transport.tend()
    expected = "a collective failed: CUDA error" if broken else "rows that were queued did not arrive within 0.2 s"
    assert transport.aborted.startswith(expected)
    assert queue.aborts == 1
    assert all(work.done for work in queue.works)


def test_without_a_heartbeat_nothing_is_kept_of_what_was_queued(transport: AllToAllTransport) -> None:
    for _ in range(5):
        transport.expect(torch.empty(3), [1, 1, 1], LABEL).send(torch.empty(3), [1, 1, 1])
    assert not transport._followed


# ---- its end ----


def test_a_group_that_has_lost_a_peer_is_aborted_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda _: done.append("destroyed"))
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda _: done.append("aborted"))
    for kind, in_peace in (("cuda", True), ("cuda", False), ("xpu", False), ("cpu", False)):
        end_group(SimpleNamespace(), torch.device(kind), in_peace=in_peace)  # type: ignore[arg-type]
    assert done == ["destroyed", "aborted", "aborted", "destroyed"]


def test_torchs_own_time_out_which_ends_the_process_comes_long_after_the_deadline() -> None:
    assert backend_timeout_s(torch.device("cpu"), 60.0) == 60.0
    assert backend_timeout_s(torch.device("cuda"), 60.0) >= 5 * 60.0
    assert backend_timeout_s(torch.device("cuda"), 0.5) >= 60.0


# ---- devices of other names ----


class Module:
    """What torch has for a device type, torch.npu for one."""

    def __init__(self, *, streams: bool) -> None:
        self.done: list[object] = []
        if streams:
            self.current_stream = lambda device: SimpleNamespace(synchronize=lambda: self.done.append(device))

    def synchronize(self) -> None:
        self.done.append("all")

    def set_device(self, device: torch.device) -> None:
        self.done.append(device)


@pytest.mark.parametrize("streams", [True, False])
def test_a_copy_to_the_host_waits_for_whatever_accelerator_it_comes_from(streams: bool) -> None:
    module, counts = Module(streams=streams), torch.tensor([3, 4])
    asked = mock.patch("torch.get_device_module", return_value=module)
    with asked, mock.patch("megamoe.routing.segments.on_host", return_value=False), mock.patch("torch.cuda", None):
        there = torch.empty(2, dtype=torch.int64)
        with mock.patch.object(Workspace, "pinned", return_value=there):
            assert to_host(counts, Workspace(), "counts").tolist() == [3, 4]
    assert module.done == ([counts.device] if streams else ["all"])


def test_devices_of_any_type_are_made_current_and_the_cpu_needs_nothing() -> None:
    module = Module(streams=True)
    with mock.patch("torch.get_device_module", return_value=module):
        for name in ("cpu", "xpu", "xpu:1", "cuda:3"):
            make_current(torch.device(name))
        with on_device(torch.device("xpu:1")), on_device(torch.device("cpu")):
            synchronize(torch.device("xpu:1"))
    assert module.done == [torch.device("xpu:1"), torch.device("cuda:3"), torch.device("xpu:1")]


def test_a_worker_makes_its_own_device_the_current_one() -> None:
    module, threads = Module(streams=True), torch.get_num_threads()
    with mock.patch("torch.get_device_module", return_value=module):
        Worker(WorkerOptions("cuda:2", "127.0.0.1", "lo", threads, 1.0))
        Worker(WorkerOptions("cpu", "127.0.0.1", "lo", threads, 1.0))
    assert module.done == [torch.device("cuda:2")]


SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2)


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (("cuda:0", "cuda:0", "cuda:0"), None),
        (("cuda:1", "cuda:1", "cuda:1"), "hidden is on cuda:1, the layer is on cuda:0"),
        (("cuda:0", "cuda:1", "cuda:0"), "topk_ids is on cuda:1, the layer is on cuda:0"),
        (("cuda:0", "cuda:0", "cuda:1"), "topk_weights is on cuda:1, the layer is on cuda:0"),
        (("cuda:0", "cpu", "cuda:0"), "topk_ids is on cpu, the layer is on cuda:0"),
    ],
)
def test_a_tensor_on_another_device_of_the_same_type_is_refused(
    devices: tuple[str, str, str], said: str | None
) -> None:
    with FakeTensorMode(), mock.patch("megamoe.execution.checks.not_plain", return_value=""):  # fake ones are not
        layer = check_device("cuda")
        hidden = torch.empty(3, 64, device=devices[0])
        ids, weights = torch.zeros(3, 2, dtype=torch.int64, device=devices[1]), torch.empty(3, 2, device=devices[2])
        if said is None:
            check_input(SHAPE, layer, hidden, ids, weights)
            return
        with pytest.raises(ValueError, match=said):
            check_input(SHAPE, layer, hidden, ids, weights)


@pytest.mark.parametrize(("named", "is_called"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_layers_device_is_called_as_its_tensors_call_it_and_they_stay_there(named: str, is_called: str) -> None:
    experts = MegaMoE(SHAPE).experts
    with FakeTensorMode():
        experts.device = check_device(named)
        assert experts.device == torch.device(is_called)
        experts.half().to(is_called)
        with pytest.raises(ValueError, match=f"are on {is_called}, not to be moved to cuda:2"):
            experts.to("cuda:2")
    assert check_device("cpu:0") == torch.device("cpu")


@pytest.mark.parametrize("num_tokens", [0, 3, 2500])
@pytest.mark.parametrize("hashed", [False, True])
def test_a_router_stays_on_its_device(num_tokens: int, hashed: bool) -> None:
    """Tensors without data mix with no others: an allocation elsewhere would be refused."""
    with torch.device("meta"):
        table = torch.zeros(100, 2, dtype=torch.int64) if hashed else None
        router = Router(torch.empty(6, 64), 2, 1.0, bias=None if hashed else torch.empty(6), table=table)
        hidden = torch.empty(num_tokens, 64, dtype=torch.bfloat16)
        token_ids = torch.zeros(num_tokens, dtype=torch.int64)
    ids, weights = router(hidden, token_ids)
    assert [each.device.type for each in (ids, weights)] == ["meta", "meta"]
    assert (ids.shape, ids.dtype, weights.shape) == ((num_tokens, 2), torch.int64, (num_tokens, 2))


# ---- a profiler's ranges ----


def test_blocks_of_work_on_a_gpu_are_nvtx_ranges_and_on_a_cpu_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[str] = []

    @contextmanager
    def open_range(name: str) -> Iterator[None]:
        ranges.append(f"begin {name}")
        yield
        ranges.append(f"end {name}")

    monkeypatch.setattr(torch.cuda.nvtx, "range", open_range)
    for kind in ("cpu", "cuda", "npu"):
        group = EPGroup(0, 2, SimpleNamespace(device_type=kind), 1.0)
        notes = group.notes(kind, 1)
        with notes.lane("call"), notes.lane("linear-1", 2, rows=7):
            assert group.own_status.position().phase == "linear-1"
    assert ranges == [
        "begin megamoe call",
        "begin megamoe linear-1, wave 2",
        "end megamoe linear-1, wave 2",
        "end megamoe call",
    ]
