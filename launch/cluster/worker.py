"""A rank's process under any launcher: joins a group, holds a model, runs its share of each batch."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore

from megamoe.execution.checks import check_wire
from megamoe.execution.journeys import CallRecord
from megamoe.model.deepseek_v4.blocks import ExpertStack
from megamoe.model.deepseek_v4.checkpoint import Checkpoint
from megamoe.parallel.group import EPGroup, init_group
from megamoe.parallel.health.status import RankStatus
from megamoe.parallel.streams import make_current
from megamoe.routing.waves import Waves

if TYPE_CHECKING:
    from megamoe.launch.cluster.generation import Advance, GenerationJob, GenerationWorker
    from megamoe.model.loading.prompts import PromptModel


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker is set up, once.

    device       "cpu", "cuda:0", "npu:1": where it computes
    address      IP address that the other ranks reach it at
    interface    network interface of that address
    threads      torch threads
    deadline_s   bound on every wait
    run          id of the run, under which `megamoe doctor --run` finds the rank; None leaves it unlisted
    """

    device: str
    address: str
    interface: str
    threads: int
    deadline_s: float
    run: str | None = None


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of one generation of the group meet, and which of them the worker is."""

    address: str
    port: int
    generation: int
    rank: int
    size: int


@dataclass(frozen=True, slots=True)
class Load:
    """A checkpoint to load, and how its layers are to run. whole: with its attention, as a model of transformers.

    ValueError for formats that there are not.
    """

    checkpoint: Path
    waves: Waves = "auto"
    dispatch_format: str = "mxfp8"
    combine_format: str = "bf16"
    whole: bool = False

    def __post_init__(self) -> None:
        check_wire(self.dispatch_format, self.combine_format)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a worker read: experts that it had already, experts read from disk, bytes read in all.

    vocab_size   of the checkpoint, the same on all ranks
    """

    experts_kept: int
    experts_read: int
    bytes_read: int
    vocab_size: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Who a worker is."""

    host: str
    pid: int
    device: str


class Worker:
    """One at a time: a group, a model, a batch. Every method can be called from another process by name."""

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        torch.set_num_threads(options.threads)
        make_current(torch.device(options.device))  # what backends and kernels take where none is named
        self._store: TCPStore | None = None
        self._group: EPGroup | None = None
        self._membership, self._reading = ExitStack(), ExitStack()
        self._checkpoint: Checkpoint | None = None
        self._loaded: Load | None = None
        self._model: ExpertStack | PromptModel | None = None
        self._texts: GenerationWorker | None = None

    def info(self) -> WorkerInfo:
        return WorkerInfo(socket.gethostname(), os.getpid(), self.options.device)

    def open_store(self) -> tuple[str, int]:
        """Opens the store where the ranks of the next generation meet; its address and port. Rank 0 is asked this."""
        timeout = timedelta(seconds=self.options.deadline_s)
        self._store = TCPStore(self.options.address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return self.options.address, self._store.port

    def reach(self, address: str, port: int, within_s: float) -> bool:
        """Whether this rank can connect to where the others meet."""
        try:
            socket.create_connection((address, port), timeout=within_s).close()
        except OSError:
            return False
        return True

    def join(self, rendezvous: Rendezvous) -> None:
        """Leaves the group there was and joins a new one. All ranks of it must."""
        self.leave()
        timeout = timedelta(seconds=self.options.deadline_s)
        store: TCPStore | None = self._store
        if store is None or rendezvous.rank:
            store = TCPStore(rendezvous.address, rendezvous.port, is_master=False, timeout=timeout)
        prefixed = PrefixStore(f"generation{rendezvous.generation}", store)
        self._enter(rendezvous.rank, rendezvous.size, store=prefixed)

    def join_torchrun(self, rank: int, size: int) -> None:
        """join() where the ranks meet as torchrun's environment says."""
        self.leave()
        self._enter(rank, size, init_method="env://")

    def _enter(self, rank: int, size: int, *, store: Store | None = None, init_method: str | None = None) -> None:
        options = self.options
        self._group = self._membership.enter_context(
            init_group(
                options.device,
                rank=rank,
                size=size,
                store=store,
                init_method=init_method,
                address=options.address,
                run=options.run,
                deadline_s=options.deadline_s,
            )
        )

    def leave(self) -> None:
        """Leaves the group, if there is one, and closes the checkpoint. The model stays, for load() to go on with."""
        self._group = self._checkpoint = None
        self._reading.close()
        if self._texts is not None:
            self._texts.leave()
        self._membership.close()
        gc.collect()  # a group's parts refer to each other, and its connections are open until the last of them is gone

    def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """work(group, *args). What it raises is told to the other ranks, and the group cannot be used after it."""
        with self._announced() as group:
            return work(group, *args)

    @contextmanager
    def _announced(self) -> Iterator[EPGroup]:
        """The group, for the block; what ends it is told to the others, who would wait for this rank in vain."""
        assert self._group is not None, "join() comes first"
        try:
            yield self._group
        except Exception as error:
            self._group.announce(error)
            raise

    def position(self) -> RankStatus:
        """Where this rank is."""
        return RankStatus() if self._group is None else self._group.own_status.position()

    def load(self, load: Load) -> LoadReport:
        """Reads what this rank needs of the checkpoint and does not have yet. All ranks of the group must load alike.

        The same Load again, in another group, reads only the experts that came to this rank. ValueError for what is no
        such checkpoint; what was loaded before is then given up.
        """
        assert self._group is not None, "join() comes first"
        model: Any = self._model if load == self._loaded else None
        self._model = None
        self._loaded = self._checkpoint = None
        self._reading.close()
        how: dict[str, Any] = {name: getattr(load, name) for name in ("waves", "dispatch_format", "combine_format")}
        how["device"] = self.options.device
        checkpoint = moved = None
        if load.whole:
            from megamoe.model.loading.prompts import PromptModel  # here because it brings transformers

            if model is None:
                model = PromptModel.load(load.checkpoint, self._group, **how)
            else:
                moved = model.regroup(self._group)
            bytes_read, vocab_size = model.bytes_read, model.vocab_size
        else:
            checkpoint = self._reading.enter_context(Checkpoint.open(load.checkpoint))
            if model is None:
                model = ExpertStack.load(checkpoint, self._group, **how)
            else:
                moved = model.regroup(checkpoint, self._group)
            bytes_read, vocab_size = checkpoint.bytes_read, checkpoint.config.vocab_size
        if moved is not None:
            gc.collect()  # the model was the last that knew its old group
        kept, read = moved or (0, model.num_local_experts)
        self._model, self._loaded, self._checkpoint = model, load, checkpoint
        return LoadReport(kept, read, bytes_read, vocab_size)

    def hidden_states(self, prompts: Sequence[Sequence[int]], rounds: int) -> tuple[list[Tensor], CallRecord]:
        """This rank's prompts, each alone -> hidden [T, H] of each, what its layers did. As forward() otherwise.

        rounds   the most prompts that any rank has
        """
        assert self._model is not None, "load() comes first"
        assert not isinstance(self._model, ExpertStack), "load(whole=True) comes first"
        with self._announced():
            return self._model.forward(prompts, rounds)

    def forward(self, token_ids: Sequence[int]) -> tuple[Tensor, CallRecord]:
        """This rank's share of a batch, perhaps of no tokens -> hidden [T, H] bfloat16 on the CPU, what its layers did.

        All ranks of the group must call. ValueError for a token that the checkpoint has no embedding of. What one rank
        raises is told to the others, and the group cannot be used after it.
        """
        assert isinstance(self._model, ExpertStack), "load() comes first"
        assert self._checkpoint is not None, "load() comes after join()"
        with self._announced():
            _check_tokens(token_ids, self._checkpoint.config.vocab_size)
            ids = torch.tensor(token_ids, dtype=torch.int64)
            hidden = self._checkpoint.embedding(ids).to(self.options.device)  # only these rows of the table are read
            out = self._model(hidden, ids.to(self.options.device))
            return out.cpu(), sum(self._model.calls, CallRecord())

    def advance(self, job: GenerationJob, steps: int) -> Advance:
        """The next steps of a generation. All ranks of the group must call. Errors as GenerationWorker has them."""
        if self._texts is None:
            from megamoe.launch.cluster.generation import GenerationWorker  # here because it brings transformers

            self._texts = GenerationWorker(self.options.device)
        with self._announced() as group:
            return self._texts.advance(group, job, steps)


def _check_tokens(token_ids: Sequence[int], vocab_size: int) -> None:
    outside = [token for token in token_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"token {outside[0]} is outside of the checkpoint's vocabulary of {vocab_size}")
