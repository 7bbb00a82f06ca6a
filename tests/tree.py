"""The tree of the four rooms, a line for every file, made of what each says of itself: docs/tree.md.

python -m tests.tree --write docs/tree.md
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("launch", "model", "megamoe", "parallel")
HEAD = """# Tree

Every file of the four rooms in its own words. How they work together: [architecture.md](architecture.md).

    python -m tests.tree --write docs/tree.md
"""


def purpose(path: Path) -> str:
    """The first sentence of what a file says of itself, without its full stop."""
    text = path.read_text()
    if path.suffix == ".py":
        text = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    else:
        text = text.partition("\n\n")[0].replace("//", " ")
    return re.split(r"(?<=[\w)`\"])\.(?: |$)", " ".join(text.split()))[0]


def folders(room: Path) -> list[Path]:
    """A room and the folders in it that have code, links left out."""
    inside = sorted(each for each in room.iterdir() if each.is_dir() and not each.is_symlink())
    found = [folder for each in inside if not each.name.startswith("__") for folder in folders(each)]
    return [room, *(each for each in found if code(each))]


def code(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix in (".py", ".cpp", ".h"))


def tree() -> str:
    """The page."""
    lines = [HEAD]
    for folder in (folder for room in ROOMS for folder in folders(ROOT / room)):
        files = code(folder)
        said = [purpose(each) for each in files if each.name == "__init__.py"]
        lines += [f"\n## {folder.relative_to(ROOT)}\n", *(f"{each}.\n" for each in said)]
        lines += [f"- `{each.name}` {purpose(each)}" for each in files if each.name != "__init__.py"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"] or len(sys.argv) != 3:
        sys.exit("usage: python -m tests.tree --write FILE")
    Path(sys.argv[2]).write_text(tree())
