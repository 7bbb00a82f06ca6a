"""What every rank needs, imported once by the fork server. It may start no threads and open no device."""

from __future__ import annotations

import atexit
import gc
import shutil
from pathlib import Path

import psutil

gc.disable()  # imports leave no garbage, and torch's many objects would be looked through again and again

import megamoe.launch.cluster.spawn  # noqa: E402
import megamoe.launch.ranks  # noqa: E402, F401

gc.freeze()  # they stay, and a collection in a forked process leaves the pages that it shares with others
gc.enable()


def _leave_nothing() -> None:
    """Has the server remove the folder of its socket when it ends: a program that was killed could not."""
    for socket in psutil.Process().net_connections("unix"):
        folder = Path(socket.laddr or "/").parent
        if folder.name.startswith("pymp-"):
            atexit.register(shutil.rmtree, folder, ignore_errors=True)


_leave_nothing()
