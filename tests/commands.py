"""The command line in this process: for requests whose claim is not about a process, since a process each is slow."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from typer.testing import CliRunner, Result

from megamoe.launch.cli.main import app

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def invoked(*arguments: object, **environment: str) -> Result:
    """What the command comes to: its exit_code, stdout and stderr. This process handles signals as before it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", **environment})
        return runner.invoke(app, [str(each) for each in arguments])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refused(*arguments: object, **environment: str) -> str:
    """What stderr says of a request that is wrong, with exit code 2 and nothing on stdout; each blank one space."""
    done = invoked(*arguments, **{"COLUMNS": "200", **environment})
    assert done.exit_code == 2, (arguments, done.exit_code, done.output, done.exception)
    assert done.stdout == ""
    return " ".join(done.stderr.split())


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """A block in which this process can write no file beyond so many bytes, as on a disk that becomes full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
