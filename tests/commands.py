"""The command line in this process: for requests that end before anything is started, a process each would be slow."""

from __future__ import annotations

from typer.testing import CliRunner

from megamoe.launch.cli.main import app


def refused(*arguments: object) -> str:
    """What stderr says of a request that is wrong, with exit code 2 and nothing on stdout; each blank one space."""
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 2, (arguments, done.exit_code, done.output, done.exception)
    assert done.stdout == ""
    return " ".join(done.stderr.split())
