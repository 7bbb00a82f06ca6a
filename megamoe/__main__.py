"""python -m megamoe, and the megamoe command: Ctrl-C is heard before anything that takes time is imported."""

from __future__ import annotations

import atexit
import os
import signal


def main() -> None:
    signal.signal(signal.SIGINT, _interrupted)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # all is done: Python would end by the signal
    if not os.environ.get("COLUMNS", "80").strip("0"):  # a terminal that does not know its width
        del os.environ["COLUMNS"]
    from megamoe.launch.cli.main import main as command

    command()


def _interrupted(*_: object) -> None:
    """Ends the process at once: before a verb has begun, and after it, there is nothing to take down."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
