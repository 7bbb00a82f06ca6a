"""From source to a shared library, once for each path, kept in torch's cache of extensions.

A library is built in a folder of its own and moved into the cache when it is whole, so that ranks which start at once,
and a build that was interrupted, leave nothing half done. One rank compiles while the others wait for it. The folder of
a builder that was killed is removed by the next one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path as FilePath

import torch

from megamoe.kernels.cpu.paths import Path

SOURCES = ("rows.cpp", "routing.cpp", "values/backward.cpp")  # and the path's products
HEADERS = ("out.h", "vectors.h", "library.h", "values/mxfp8.h")
# without OpenMP's own library: what is called of it is torch's, which has been loaded before
LINK = ("-shared", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)
_OPENMP = "-Wp,-fopenmp" if sys.platform == "darwin" else "-fopenmp"  # Apple's c++ passes on what it refuses
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", _OPENMP, "-fPIC")
DEADLINE_S = 300.0
_BUILDING = ".building-"
_FORGOTTEN_S = 12 * DEADLINE_S  # after which a folder is nobody's whose builder cannot be asked after
_HERE = FilePath(__file__).parent


class BuildError(RuntimeError):
    """Why there is no library: no compiler, or what it said."""


def build(path: Path, note: Callable[[str], None] | None = None) -> FilePath:
    """The path's library, compiled where the cache has none. note is told before a compilation begins.

    BuildError where the compiler is missing or fails, or does not end within DEADLINE_S; and on Windows, whose programs
    cannot leave OpenMP to a library that is there when they run.
    """
    if sys.platform == "win32":
        raise BuildError("they are not built on Windows, but in WSL")
    found = _built(path)
    if found is not None:
        return found
    library = _cache() / f"{path.name}-{_fingerprint(path)}.so"
    with _turn(library):
        if not library.exists():
            compiler = shlex.split(_compiler())
            if shutil.which(compiler[0]) is None:
                raise BuildError(f"there is no C++ compiler {compiler[0]!r}")
            if note is not None:
                note(f"compiling the CPU's kernels ({path.name}), once on this machine")
            _compile(path, library, compiler)
    return library


def is_built(path: Path) -> bool:
    """Whether the cache has the path's library."""
    return sys.platform != "win32" and _built(path) is not None


def _built(path: Path) -> FilePath | None:
    """The path's library, also where it lies in a cache that this user may only read."""
    name, (torchs, own) = f"{path.name}-{_fingerprint(path)}.so", _caches()
    folders = (torchs, own) if _is_own(own) else (torchs,)
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def _caches() -> tuple[FilePath, FilePath]:
    """torch's folder of extensions, and this user's own for where that cannot be written, which ranks share too."""
    try:
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or FilePath.home() / ".cache" / "torch_extensions"
    except RuntimeError:  # nobody's home is known
        root = os.devnull
    if sys.platform == "win32":
        raise AssertionError("build() comes first")
    return FilePath(root) / "megamoe", FilePath(tempfile.gettempdir()) / f"megamoe-kernels-{os.getuid()}"


def _cache() -> FilePath:
    """The first cache that this user may write. BuildError where there is none."""
    torchs, own = _caches()
    with suppress(OSError):  # read-only or full: the other may not be
        torchs.mkdir(parents=True, exist_ok=True)
        if os.access(torchs, os.W_OK):
            return torchs
    with suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
        if _is_own(own) and os.access(own, os.W_OK):
            return own
    raise BuildError(f"neither {torchs} nor {own} is a folder that this user alone may write: set TORCH_EXTENSIONS_DIR")


def _is_own(folder: FilePath) -> bool:
    """Whether it is there, and nobody else can have put a library into it."""
    if sys.platform == "win32":
        raise AssertionError("build() comes first")
    try:
        found = folder.lstat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700


def _fingerprint(path: Path) -> str:
    """Of what the library is made from: sources, flags, torch, and the compiler that would be asked."""
    digest = hashlib.sha256()
    for name in (path.products, *SOURCES, *HEADERS):
        digest.update((_HERE / name).read_bytes())
    said = [*FLAGS, *path.flags, torch.__version__, _compiler(), platform.machine()]
    digest.update("\0".join(said).encode())
    return digest.hexdigest()[:16]


def _compiler() -> str:
    """As torch's builder of extensions chooses it."""
    return os.environ.get("CXX") or "c++"


@contextmanager
def _turn(library: FilePath) -> Iterator[None]:
    """Waits until no other process builds this library. A process that dies gives its turn back."""
    if sys.platform == "win32":
        raise AssertionError("build() comes first")
    import fcntl

    deadline = time.monotonic() + DEADLINE_S
    with open(library.with_suffix(".lock"), "wb") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as taken:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has been building {library} for {DEADLINE_S:g} s") from taken
                time.sleep(0.05)
        yield


def _compile(path: Path, library: FilePath, compiler: Sequence[str]) -> None:
    """Compiles all sources at once, and links what comes out."""
    with tempfile.TemporaryDirectory(prefix=f"{_BUILDING}{_here()}-{os.getpid()}-", dir=library.parent) as folder:
        _sweep(FilePath(folder))
        sources = [_HERE / name for name in (path.products, *SOURCES)]
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(len(sources)) as pool:
            pairs = zip(sources, objects, strict=True)
            commands = [[*compiler, *FLAGS, *path.flags, "-c", str(source), "-o", made] for source, made in pairs]
            list(pool.map(_run, commands))
        built = f"{folder}/{library.name}"
        _run([*compiler, *LINK, *objects, "-o", built])
        os.replace(built, library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise BuildError(f"the compiler did not end within {DEADLINE_S:g} s") from late
    except OSError as refusal:
        raise BuildError(f"{command[0]} cannot be run: {refusal}") from refusal
    if done.returncode:
        raise BuildError(_reason(done.stdout + done.stderr))


def _here() -> str:
    """Of this machine since it was started, and of what it has as one space of process ids."""
    try:
        boot = FilePath("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        known = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        known = platform.node()
    return hashlib.sha256(known.encode()).hexdigest()[:12]


def _sweep(own: FilePath) -> None:
    """Removes what builders beside have left that do not live any more, as far as this user may.

    Another machine may share the cache: its builders are judged by age, by the clock of the file system, which had both
    folders to date.
    """
    for folder in own.parent.glob(f"{_BUILDING}*"):
        where, _, rest = folder.name.removeprefix(_BUILDING).partition("-")
        pid = rest.partition("-")[0]
        with suppress(OSError):  # it has gone meanwhile
            if where == _here() and pid.isdecimal():
                left = not _lives(int(pid))
            else:
                left = own.stat().st_mtime - folder.stat().st_mtime > _FORGOTTEN_S
            if left:
                shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user; or no process id, of which nothing is known
        return True
    return True


def _reason(said: str) -> str:
    """The line of a failed build that says why: the compiler's first error, else what Python ended with."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines[-1:] or ["the compiler said nothing"])[0]
