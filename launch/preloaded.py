"""What every rank needs, imported once by the fork server. It may start no threads and open no device."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
from pathlib import Path

import psutil

gc.disable()  # imports leave no garbage, and torch's many objects would be looked through again and again

import megamoe.launch.cluster.spawn  # noqa: E402
import megamoe.launch.ranks  # noqa: E402, F401

gc.freeze()  # they stay, and a collection in a forked process leaves the pages that it shares with others
gc.enable()


def _leave_nothing(folder: Path) -> None:
    """The server's end: the folder of its socket goes, which a program that was killed could not remove.

    Nothing else is taken apart: what is frozen is not collected, and libraries would call that a leak.
    """
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


for socket in psutil.Process().net_connections("unix"):
    place = Path(socket.laddr or "/").parent
    if place.name.startswith("pymp-"):
        atexit.register(_leave_nothing, place)
