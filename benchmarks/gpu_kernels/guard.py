"""Cleans up after a runner that was killed: ends the group of the stage that ran, removes the temporary folder.

A process of its own that waits for the end of a pipe, whose other end the runner alone has.
"""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path


class Guard:
    """pipe: the runner's end, which no stage may hold open."""

    def __init__(self, scratch: Path) -> None:
        theirs, self.pipe = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.setsid()
                os.close(self.pipe)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
                _clean_up(_last_group(theirs), scratch)
            finally:
                os._exit(0)
        os.close(theirs)

    def watch(self, group: int) -> None:
        """From now on it is this process group that is ended; 0 is none."""
        os.write(self.pipe, f"{group}\n".encode())

    def end(self) -> None:
        os.close(self.pipe)
        os.waitpid(self._pid, 0)


def _last_group(pipe: int) -> int:
    """Returns when the pipe has ended."""
    with os.fdopen(pipe) as lines:
        return ([0] + [int(line) for line in lines])[-1]


def _clean_up(group: int, scratch: Path) -> None:
    if group:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    shutil.rmtree(scratch, ignore_errors=True)
