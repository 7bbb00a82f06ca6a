"""What a worker prints: to this process's stderr, line by line with its name before it, and kept in a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


class WorkerOutput:
    """Takes what was read of a worker's stdout and stderr and passes whole lines on.

    label   asked before every line: "rank 2" makes "[rank 2] line"
    log     file that everything is appended to as it came, None keeps nothing
    """

    def __init__(self, label: Callable[[], str], log: Path | None) -> None:
        self._label, self._rest, self._shown = label, b"", True
        self._log = None if log is None else log.open("ab", buffering=0)
        self.last_line = ""

    def take(self, data: bytes) -> None:
        if self._log is not None:
            self._log.write(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._show(line)

    def close(self) -> None:
        """Shows the line that was not ended."""
        if self._rest:
            self._show(self._rest)
        self._rest = b""
        if self._log is not None:
            self._log.close()

    def _show(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self.last_line = text.strip() or self.last_line
        try:
            if self._shown:
                sys.stderr.write(f"[{self._label()}] {text}\n")
        except (OSError, ValueError):  # stderr is closed, or nobody reads it any more: the worker goes on
            self._shown = False
