"""A function on every rank of a torchrun that is started for it: the same work as under the other launchers."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamoe.catalog.wording import plural
from megamoe.launch.cluster.torchrun import Place, torchrun_options
from megamoe.launch.cluster.worker import Worker
from megamoe.launch.process import loopback, share_of_cores
from megamoe.launch.requests import check_ranks_here

_ENDING_S = 20.0
_STDERR = 2  # of this process, whatever stands for it as sys.stderr: in a notebook that is no file


def run_under_torchrun(
    ranks: int, work: Callable[..., Any], *args: Any, device: str = "cpu", deadline_s: float = 60.0
) -> list[Any]:
    """work(group, *args) on every rank, results in order of rank; ranks and torchrun are gone when this returns.

    What ranks print goes to stderr. RuntimeError where torchrun fails or takes longer than deadline_s.
    """
    check_ranks_here("ranks", ranks)
    here = loopback().address
    with tempfile.TemporaryDirectory(prefix="megamoe-torchrun-") as place:
        folder = Path(place)
        (folder / "work").write_bytes(pickle.dumps((work, args, device, deadline_s)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["--local-addr", here]  # else the machine's name, which may stand for no address, as .local on a Mac
        command += ["--log-dir", place, "--module", "megamoe.launch.cluster.torchrun_work", place]
        environment = {"OMP_NUM_THREADS": str(share_of_cores(ranks)), **os.environ}  # else torchrun warns and sets 1
        # ranks import what this process would, whatever modules the folder has in which the user is
        environment |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(each or os.getcwd() for each in sys.path)}
        process = subprocess.Popen(command, stdout=_STDERR, env=environment)
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired as late:
            raise RuntimeError(
                f"{plural(ranks, 'rank')} under torchrun did not finish within {deadline_s:g} s"
            ) from late
        finally:
            _end(process)
        outcomes = [_outcome(folder / f"rank-{rank}") for rank in range(ranks)]
    errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    if errors:
        raise errors[0]
    if code:
        raise RuntimeError(f"torchrun ended with exit code {code}")
    return outcomes


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun takes its ranks down when it is told to end."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _outcome(file: Path) -> Any:
    if not file.exists():
        return None
    return pickle.loads(file.read_bytes())


def main() -> None:
    """A rank: does the work that lies in the folder, and leaves there what came of it."""
    folder = Path(sys.argv[1])
    work, args, device, deadline_s = pickle.loads((folder / "work").read_bytes())
    place = Place.read()
    worker = Worker(torchrun_options(device, place, None, deadline_s))
    outcome: Any
    try:
        worker.join_torchrun(place.rank, place.size)
        outcome = worker.run(work, *args)
    except Exception as error:  # noqa: BLE001  raised where the work came from
        outcome = error
    finally:
        worker.leave()
    draft = folder / f"draft-{place.rank}"
    draft.write_bytes(pickle.dumps(outcome))
    draft.replace(folder / f"rank-{place.rank}")
    if isinstance(outcome, Exception):
        raise outcome


if __name__ == "__main__":
    main()
