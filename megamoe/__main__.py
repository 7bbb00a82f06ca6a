"""python -m megamoe: the same as the megamoe command."""

from __future__ import annotations

from megamoe.launch.cli.main import main

main()
