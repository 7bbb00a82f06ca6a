"""House rules that no type checker holds: who imports whom, what importing costs, how files begin."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import megamoe
from tests.tree import ROOMS as TREE_ROOMS
from tests.tree import code, folders, tree

ROOT = Path(__file__).parents[1]
ROOMS = ("parallel", "model", "launch")
NOT_OURS = {"build", "dist", "shared", "__pycache__", "node_modules"}


def python_files(root: Path) -> Iterator[Path]:
    """Every Python file of the repository once, by its own path and not through megamoe's links."""
    for folder, inside, names in os.walk(root, followlinks=False):
        inside[:] = [name for name in inside if name not in NOT_OURS and not name.startswith(".")]
        inside[:] = [name for name in inside if not (Path(folder) / name / "pyvenv.cfg").exists()]
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


FILES = sorted(python_files(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def run(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that imports from folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def test_the_walk_finds_the_four_rooms_and_the_tests_once() -> None:
    names = [str(path.relative_to(ROOT)) for path in FILES]
    for expected in (
        "megamoe/layer.py",
        "parallel/placement.py",
        "launch/ranks.py",
        "model/__init__.py",
        "tests/cases.py",
    ):
        assert names.count(expected) == 1
    assert not [name for name in names if name.startswith(tuple(f"megamoe/{room}" for room in ROOMS))]


# ---- imports ----


def test_imports_point_down() -> None:
    done = run(LINT_IMPORTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_an_import_that_points_up_would_be_noticed(tmp_path: Path) -> None:
    for name in ("megamoe", *ROOMS):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "parallel" / "placement.py").open("a") as file:
        file.write("\nfrom megamoe.routing.waves import WavePlan\n")
    done = run(LINT_IMPORTS, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "megamoe.parallel.placement -> megamoe.routing.waves" in done.stdout


def imported_packages(tree: ast.Module) -> set[str]:
    """Top-level names that a file imports, wherever in it"""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


def test_imported_packages_are_found_in_every_spelling() -> None:
    code = (
        "import parallel.group as g, os\nfrom model import x\ndef f():\n    from launch.ranks import y\nfrom . import z"
    )
    assert imported_packages(ast.parse(code)) == {"parallel", "os", "model", "launch"}


def test_rooms_are_imported_through_megamoe_only() -> None:
    found = {str(path): imported_packages(tree_of(path)) & set(ROOMS) for path in FILES}
    assert {path: rooms for path, rooms in found.items() if rooms} == {}


def text_files_without_encoding(tree: ast.Module) -> Iterator[int]:
    """Lines that open a file as text in the encoding of whoever runs it, which on Windows is not UTF-8."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        given = [*call.args, *(each.value for each in call.keywords if each.arg == "mode")]
        texts = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        modes = [each for each in texts if re.fullmatch("[rwax]b?[+]?", each)]
        if name == "open" or name.endswith("TemporaryFile"):
            text = "b" not in modes[0] if modes else isinstance(call.func, ast.Name) and name == "open"
        else:
            text = (name, len(call.args)) in (("read_text", 0), ("write_text", 1))
        if text and "encoding" not in [each.arg for each in call.keywords]:
            yield call.lineno


def test_text_is_read_and_written_in_utf8_on_every_system() -> None:
    code = "open(a)\nopen(a, 'w')\na.open('r')\na.read_text()\na.write_text(b)\nopen(a, 'rb')\nFiles.open(a)"
    assert sorted(text_files_without_encoding(ast.parse(code))) == [1, 2, 3, 4, 5]
    package = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("megamoe", *ROOMS)]
    found = {str(path): list(text_files_without_encoding(tree_of(path))) for path in package}
    assert {path: lines for path, lines in found.items() if lines} == {}


PLANNING = [path for path in FILES if path.is_relative_to(ROOT / "megamoe" / "planner")]
CATALOG = [path for path in FILES if path.is_relative_to(ROOT / "megamoe" / "catalog")]
NO_TORCH = ("megamoe.planner", "megamoe.catalog", "megamoe.schedule", "megamoe.paths")
SCHEDULE = [path for path in FILES if path.is_relative_to(ROOT / "megamoe" / "schedule")]


def test_the_planner_needs_no_torch() -> None:
    allowed = sys.stdlib_module_names | {"numpy", "pydantic", "pydantic_core", "yaml", "typing_extensions", "megamoe"}
    allowed |= {"jinja2", "markupsafe"}  # of the report's page alone
    for path in PLANNING + CATALOG + SCHEDULE:
        assert imported_packages(tree_of(path)) <= allowed, path
        ours = {str(node.module) for node in ast.walk(tree_of(path)) if isinstance(node, ast.ImportFrom)}
        ours = {name for name in ours if name.startswith("megamoe.")}
        assert all(name.startswith(NO_TORCH) for name in ours), path


# ---- what libraries call private ----

OURS = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("megamoe", *ROOMS)]
PRIVATE = {"parallel/private.py", "launch/cluster/ray/private.py", "model/private.py"}
# as they are read where they are needed: torch tells neither in public
LEFT = {
    "megamoe/execution/checks.py": {"_current_level"},
    "megamoe/execution/products.py": {"_version"},
    "megamoe/training/steps.py": {"_version"},
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_made(tree: ast.AST) -> set[str]:
    """Names that a file defines or assigns: functions, classes, variables, attributes."""
    made = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    made |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return made | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


def private_uses(tree: ast.AST, ours: set[str]) -> set[str]:
    """Private names that a file asks of others, and none of ours makes."""
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and private(n.attr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            used |= {part for part in str(node.module).split(".") if private(part)}
            used |= {alias.name for alias in node.names if private(alias.name)}
        if isinstance(node, ast.Import):
            used |= {part for alias in node.names for part in alias.name.split(".") if private(part)}
    return used - ours - {"_exit", "_replace"}  # of os and of named tuples: public, for all their names


def test_private_names_are_told_from_our_own() -> None:
    code = "from torch import _C\nimport ray._private.state\nself._ours = group._get_backend(1)\nself._ours.__len__"
    assert private_uses(ast.parse(code), names_made(ast.parse(code))) == {"_C", "_private", "_get_backend"}


def test_what_libraries_call_private_is_used_in_two_files_that_give_the_reasons() -> None:
    trees = {str(path.relative_to(ROOT)): tree_of(path) for path in OURS}
    ours = set().union(*map(names_made, trees.values()))
    used = {name: private_uses(tree, ours) for name, tree in trees.items()}
    assert {name: found for name, found in used.items() if found and name not in PRIVATE} == LEFT
    assert all(used[name] for name in PRIVATE)


# ---- the tree ----


def test_no_folder_holds_more_than_a_dozen_files() -> None:
    sizes = {str(folder.relative_to(ROOT)): len(code(folder)) for room in TREE_ROOMS for folder in folders(ROOT / room)}
    assert {name: size for name, size in sizes.items() if size > 12} == {}


def test_the_tree_in_the_docs_has_every_file_in_its_own_words() -> None:
    assert (ROOT / "docs" / "tree.md").read_text() == tree(), "python -m tests.tree --write docs/tree.md"


# ---- the docs ----

WRITTEN_OR_GIVEN = {  # files of a user, or of a command
    "config.json",
    "megamoe_manifest.json",
    "megamoe.py",
    "random.py",
    "results.json",
    "logs/",
    "tables/",
}


def test_files_that_the_docs_name_are_there() -> None:
    """`planner/layer/cost.py` means the file whose path ends so, wherever its folder is."""
    ours = [
        path.relative_to(ROOT).as_posix()
        for room in (*TREE_ROOMS, "benchmarks", "examples", "tests", "docs")
        for path in files_below(ROOT / room)
    ]
    named = re.compile(r"`([\w./-]+\.(?:py|cpp|yaml|json|csv|md)|[\w./-]+/)`")
    lacking = [
        f"{page.name}: {name}"
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for name in named.findall(page.read_text())
        if name not in WRITTEN_OR_GIVEN and not any(_is_called(path, name) for path in ours)
    ]
    assert len(ours) > 500
    assert lacking == []


def test_files_that_the_code_names_by_their_folder_are_there() -> None:
    """In docstrings, comments and messages: `schedule/machine.py`, `docs/lab.md`."""
    ours = [
        path.relative_to(ROOT).as_posix()
        for room in (*TREE_ROOMS, "benchmarks", "examples", "tests", "docs")
        for path in files_below(ROOT / room)
    ]
    written = {"docs/gpu_kernels.md"}  # by a command, once there is a GPU
    named = re.compile(r"(?<![\w./-])(?:[a-z_]+/)+[a-z_0-9]+\.(?:py|cpp|yaml|md)\b")
    lacking = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        if path.relative_to(ROOT).parts[0] != "tests"
        for name in set(named.findall(path.read_text(encoding="utf-8"))) - written
        if not any(_is_called(each, name) for each in ours)
    }
    assert lacking == set()


def _is_called(path: str, name: str) -> bool:
    short = name.removeprefix("../").removeprefix("megamoe/")
    return f"/{short}" in f"/{path}" if name.endswith("/") else f"/{path}".endswith(f"/{short}")


def test_the_page_of_tests_has_every_file_of_tests() -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    assert [path.name for path in sorted((ROOT / "tests").glob("test_*.py")) if f"`{path.name}`" not in page] == []


# ---- the links ----


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_stand_in_megamoe_as_relative_links(room: str) -> None:
    link = ROOT / "megamoe" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../{room}"
    assert (ROOT / room / "__init__.py").is_file()
    module = importlib.import_module(f"megamoe.{room}")
    assert Path(str(module.__file__)).resolve() == ROOT.resolve() / room / "__init__.py"


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout")
def test_the_links_are_committed_as_links() -> None:
    command = ["git", "-c", "safe.directory=*", "ls-files", "--stage", *(f"megamoe/{room}" for room in ROOMS)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.splitlines()}
    assert modes == {f"megamoe/{room}": "120000" for room in ROOMS}


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout")
def test_nothing_that_a_command_of_the_docs_writes_is_committed() -> None:
    """They are tried where the repository is, and write a table or a plan into the folder that they run in."""
    command = ["git", "-c", "safe.directory=*", "ls-files", ":(glob)*"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    read_by_tools = {".gitignore", "Makefile", "constraints.txt", "pyproject.toml"}
    assert set(listed) == {"CHANGELOG.md", "LICENSE", "README.md"} | read_by_tools


# ---- the front page ----


def test_importing_megamoe_and_listing_its_exports_imports_no_torch() -> None:
    done = run("import json, sys, megamoe; print(json.dumps([dir(megamoe), sorted(sys.modules), megamoe.__version__]))")
    assert done.returncode == 0, done.stderr
    listed, modules, version = json.loads(done.stdout)
    assert {"MegaMoE", "MoEShape", "EPGroup", "init_group", "PeerError", "MXFP4", "MXFP8"} <= set(listed)
    assert listed == sorted(megamoe.__all__)
    assert version == megamoe.__version__
    assert not [name for name in modules if name.split(".")[0] in ("torch", "numpy", "transformers")]
    assert [name for name in modules if name.startswith("megamoe")] == ["megamoe"]


@pytest.mark.parametrize("name", [name for name in megamoe.__all__ if not name.startswith("__")])
def test_every_export_is_there_under_its_own_name(name: str) -> None:
    assert getattr(megamoe, name).__name__ == name


@pytest.mark.parametrize("name", ["MegaMoe", "torch_", "planner_of_nothing"])
def test_unknown_names_are_refused_by_name(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'megamoe' has no attribute '{name}'"):
        getattr(megamoe, name)


# ---- how files begin ----


def test_what_docstrings_of_exports_list_is_there() -> None:
    """Each line `name    meaning` of a class's docstring is of a field, a parameter or an attribute of that name."""
    line = re.compile(r"^    ([a-z_]\w*(?:, [a-z_]\w*)*)  +\S", re.MULTILINE)
    for module in ("megamoe", "megamoe.model", "megamoe.training"):
        there = importlib.import_module(module)
        for name in there.__all__:
            thing = getattr(there, name)
            if not inspect.isclass(thing):
                continue
            listed = {each for found in line.findall(thing.__doc__ or "") for each in found.split(", ")}
            known = {*dir(thing), *inspect.signature(thing).parameters}
            source = inspect.getsource(thing)
            lacking = {each for each in listed - known if not re.search(rf"self\.{each}\b", source)}
            assert not lacking, f"{name}: {lacking}"


def test_every_file_begins_with_its_purpose_in_one_line() -> None:
    for path in FILES:
        purpose = ast.get_docstring(tree_of(path), clean=False)
        assert purpose, f"{path} has no docstring"
        first, *rest = purpose.split("\n")
        assert first == first.strip() != "", path
        assert not rest or not rest[0].strip(), f"{path}: the purpose goes on in the second line"


# ---- versions that pyproject.toml allows ----


def test_fields_that_old_versions_of_pydantic_warn_of_are_in_classes_that_say_so() -> None:
    """Before 2.10 a field whose name begins with model_ had every import print a warning."""
    for path in FILES:
        for each in ast.walk(tree_of(path)):
            if not isinstance(each, ast.ClassDef):
                continue
            fields = {ast.unparse(node.target) for node in each.body if isinstance(node, ast.AnnAssign)}
            if any(name.startswith("model_") for name in fields) and "BaseModel" in ast.unparse(each):
                assert "protected_namespaces=()" in ast.unparse(each), f"{path}: {each.name}"


# ---- what is installed ----


def test_a_wheel_holds_every_file_of_the_package() -> None:
    """An editable installation reads the repository, and would not notice a file that pyproject.toml leaves out."""
    settings = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    asked = settings["tool"]["setuptools"]["package-data"].items()
    folders = {package: ROOT / package.replace(".", "/") for package, _ in asked}
    installed = {path.resolve() for package, globs in asked for glob in globs for path in folders[package].glob(glob)}
    own = {path for room in ("megamoe", *ROOMS) for path in files_below(ROOT / room)}
    assert {str(path) for path in own if path.suffix != ".py"} == {str(path) for path in installed & own}
    assert len(own) > 400


def files_below(root: Path) -> Iterator[Path]:
    for folder, inside, names in os.walk(root, followlinks=False):
        inside[:] = [name for name in inside if name != "__pycache__"]
        yield from (path for path in (Path(folder, name) for name in names) if not path.is_symlink())
