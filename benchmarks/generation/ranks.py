"""Processes of a contender: started once, one for each rank, with the model; they generate when they are asked."""

from __future__ import annotations

import gc
import pickle
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from benchmarks.generation.contenders import DEADLINE_S, Contender, Passage, Prompts
from benchmarks.loading import resident
from megamoe.launch.lab.namespaces import Host
from megamoe.launch.process import Child, cause, start, uninterrupted


class Ranks:
    """A contender's model on ranks of these hosts, one thread each. RuntimeError where a rank fails, with what it said.

    memory_mb   by how much each rank's process has grown with the model and one generation
    """

    def __init__(self, contender: Contender, hosts: Sequence[Host], path: Path) -> None:
        self.contender, self._hosts, self._path = contender, hosts, path
        self._children: list[Child] = []
        self.memory_mb: list[float] = []

    def __enter__(self) -> Ranks:
        try:
            for rank, host in enumerate(self._hosts):
                given = (rank, len(self._hosts), host.address, self.contender, self._path)
                environment = {"GLOO_SOCKET_IFNAME": host.interface, "TOKENIZERS_PARALLELISM": "false"}
                name = f"{self.contender.name} {rank}"
                self._children.append(start(name, _live, *given, host=host, environment=environment))
            (port,) = self._answers(self._children[:1])
            self._tell(self._children[1:], (self._hosts[0].address, port))
            self._answers(self._children)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        with uninterrupted():
            for child in self._children:
                child.process.kill()
            for child in self._children:
                child.process.join()
                child.process.close()
                child.close()
            self._children = []

    def write(self, prompts: Prompts, new_tokens: int) -> list[Passage]:
        """A generation on all ranks."""
        self._tell(self._children, (prompts, new_tokens))
        answers = self._answers(self._children)
        self.memory_mb = [memory for _, memory in answers]
        return [passage for passage, _ in answers]

    def _tell(self, children: Sequence[Child], what: Any) -> None:
        for child in children:
            child.pipe.send_bytes(pickle.dumps(what))

    def _answers(self, children: Sequence[Child]) -> list[Any]:
        """What each says, in order. The first that fails ends the waiting for the others."""
        answers: dict[int, Any] = {}
        until = time.monotonic() + DEADLINE_S
        while len(answers) < len(children):
            pipes = {id(child.pipe): n for n, child in enumerate(children) if n not in answers}
            ready = wait([children[n].pipe for n in pipes.values()], timeout=max(0.0, until - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{self.contender.name}: no answer within {DEADLINE_S:g} s")
            for pipe in ready:
                number = pipes[id(pipe)]
                answers[number] = self._heard(children[number])
        return [answers[number] for number in range(len(children))]

    def _heard(self, child: Child) -> Any:
        try:
            failed, answer = pickle.loads(child.pipe.recv_bytes())
        except (EOFError, ConnectionError) as lost:
            child.process.join()
            raise RuntimeError(f"{child.process.name} died: {cause(child.process.exitcode)}") from lost
        if failed:
            raise RuntimeError(f"{child.process.name}: {answer}")
        return answer


def _live(pipe: Connection, rank: int, size: int, address: str, contender: Contender, path: Path) -> None:
    """Life of a rank: the store, the model, then one generation for each request."""
    torch.set_num_threads(1)
    try:
        timeout = timedelta(seconds=DEADLINE_S)
        if rank == 0:
            store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            _say(pipe, store.port)
        else:
            address, port = pickle.loads(pipe.recv_bytes())
            store = TCPStore(address, port, is_master=False, timeout=timeout)
        import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401  before memory is looked at

        import megamoe.model.generation.engine
        import megamoe.model.loading.load  # noqa: F401

        before = resident("VmRSS") / 1e6
        with contender.on_rank(rank, size, store, path) as writer:
            _say(pipe, None)
            while True:
                prompts, new_tokens = pickle.loads(pipe.recv_bytes())
                passage = writer.write(prompts, new_tokens)
                gc.collect()
                _say(pipe, (passage, resident("VmRSS") / 1e6 - before))
    except EOFError:
        return
    except BaseException as failure:  # noqa: BLE001  raised where the rank was started
        told = traceback.format_exception_only(failure)[-1].strip()
        pipe.send_bytes(pickle.dumps((True, f"{told}\n{traceback.format_exc()}")))


def _say(pipe: Connection, answer: Any) -> None:
    pipe.send_bytes(pickle.dumps((False, answer)))
