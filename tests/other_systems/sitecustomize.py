"""Another system, as far as Linux can look like it: to megamoe's modules of a process whose MEGAMOE_SYSTEM names it.

Python imports this file when it starts, where its folder is on PYTHONPATH, so that processes which such a process
starts are on that system too. Only what megamoe's own modules import is another: a module without what the system lacks
(as typeshed and Python's manual have it), or no module at all. The file system has none of Linux's own folders.

What no test of this kind shows: how gloo, compilers, dynamic loaders and file systems behave there.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

_LINUX_OS = """
    copy_file_range eventfd eventfd_read eventfd_write memfd_create pidfd_open posix_fadvise posix_fallocate
    sched_getaffinity sched_setaffinity sched_getparam sched_setparam sched_getscheduler sched_setscheduler
    sched_param sched_rr_get_interval SCHED_BATCH SCHED_IDLE splice setns unshare getrandom O_TMPFILE O_PATH
    O_DIRECT
"""
_POSIX_OS = (
    _LINUX_OS
    + """
    chown chroot confstr ctermid fchown fork forkpty fpathconf fstatvfs getegid geteuid getgid getgroups
    getloadavg getpgid getpgrp getpriority getresuid getsid getuid initgroups killpg lchown major minor mkfifo
    mknod nice openpty pathconf pipe2 posix_spawn posix_spawnp pread preadv pwrite pwritev readv
    register_at_fork sched_yield sendfile setegid seteuid setgid setpgid setpriority setsid setuid statvfs sync
    sysconf tcgetpgrp ttyname uname wait wait3 wait4 waitid writev O_CLOEXEC O_DIRECTORY O_DSYNC O_NOCTTY
    O_NOFOLLOW O_NONBLOCK O_SYNC PRIO_PROCESS SCHED_FIFO SCHED_OTHER SCHED_RR WNOHANG WIFEXITED WEXITSTATUS
    POSIX_FADV_DONTNEED
"""
)
_LINUX_SIGNALS = """
    pidfd_send_signal sigtimedwait sigwaitinfo SIGPOLL SIGPWR SIGRTMIN SIGRTMAX SIGSTKFLT SIGCLD
"""
_POSIX_SIGNALS = (
    _LINUX_SIGNALS
    + """
    SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGTSTP SIGTTIN SIGTTOU
    SIGURG SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH SIGXCPU SIGXFSZ SIG_BLOCK SIG_UNBLOCK SIG_SETMASK alarm getitimer
    pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigwait
"""
)
_LINUX_CLOCKS = """
    CLOCK_BOOTTIME CLOCK_TAI CLOCK_MONOTONIC_COARSE CLOCK_REALTIME_COARSE
"""
_POSIX_CLOCKS = (
    _LINUX_CLOCKS
    + """
    CLOCK_MONOTONIC CLOCK_MONOTONIC_RAW CLOCK_PROCESS_CPUTIME_ID CLOCK_REALTIME CLOCK_THREAD_CPUTIME_ID
    clock_getres clock_gettime clock_gettime_ns clock_settime pthread_getcpuclockid tzset
"""
)
_LINUX_SOCKETS = """
    AF_NETLINK AF_PACKET AF_VSOCK AF_ALG SO_BINDTODEVICE TCP_USER_TIMEOUT SOCK_NONBLOCK SOCK_CLOEXEC
"""

# module -> names that it has not; "*": there is no such module
LACKS = {
    "darwin": {
        "os": _LINUX_OS,
        "signal": _LINUX_SIGNALS,
        "time": _LINUX_CLOCKS,
        "select": "epoll",
        "socket": _LINUX_SOCKETS,
        "mmap": "MADV_HUGEPAGE MADV_NOHUGEPAGE MAP_POPULATE",
        "resource": "prlimit RLIMIT_NICE RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RLIMIT_MSGQUEUE RLIMIT_OFILE",
    },
    "win32": {
        "os": _POSIX_OS,
        "signal": _POSIX_SIGNALS,
        "time": _POSIX_CLOCKS,
        "select": "epoll poll POLLIN POLLOUT POLLERR POLLHUP",
        "socket": _LINUX_SOCKETS + " AF_UNIX CMSG_LEN SCM_RIGHTS sethostname",
        "mmap": "MADV_HUGEPAGE MADV_NOHUGEPAGE MAP_POPULATE MAP_SHARED MAP_PRIVATE MAP_ANONYMOUS PROT_READ PROT_WRITE",
        "multiprocessing.context": "ForkContext ForkServerContext ForkProcess ForkServerProcess",
        "torch.distributed": "HashStore",
        **dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "posix", "syslog"), "*"),
    },
}
MACHINES = {"darwin": ("Darwin", "arm64"), "win32": ("Windows", "AMD64")}
_HIDDEN = ("/proc", "/sys", "/dev/shm", "/run", "/lib/modules", "/etc/security")
_import = builtins.__import__


class Elsewhere(ModuleType):
    """A module as that system has it: without some names, and with some others."""

    def __init__(self, real: ModuleType, lacks: frozenset[str], others: Mapping[str, Any]) -> None:
        vars(self).update(__name__=real.__name__, _real=real, _lacks=lacks, _others=others)

    def __getattr__(self, name: str) -> Any:
        if name in self._lacks:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return self._others[name] if name in self._others else getattr(self._real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._real, name, value)


class System:
    """What megamoe's modules import, on that system."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._made: dict[str, ModuleType] = {}
        kind, machine = MACHINES[name]
        files = _files(open_files_stay=name == "win32")
        self._others: dict[str, dict[str, Any]] = {
            "sys": {"platform": name},
            "platform": {"system": lambda: kind, "machine": lambda: machine},
            "os": files,
        }
        if name == "win32":
            self._others |= {
                "ctypes": {"CDLL": _needs_a_name(_import("ctypes").CDLL)},
                "signal": {"signal": _only_some(_import("signal"))},
                "multiprocessing": {"get_context": _spawn_alone, "set_start_method": _spawn_alone},
            }
        import pathlib

        for place in (pathlib, sys.modules.get("pathlib._local")):
            if place is not None:
                vars(place)["os"] = Elsewhere(os, frozenset(), files)
                vars(place)["io"] = Elsewhere(io, frozenset(), {"open": _not_hidden(_by_name(io.open, name))})

    def bring(self, name: str, found: ModuleType) -> ModuleType:
        """The module as it is there, for the import of one."""
        lacks, others = LACKS[self.name].get(name, ""), self._others.get(name, {})
        if lacks == "*":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name.startswith("torch."):
            for each in lacks.split():
                vars(found).pop(each, None)
            return found
        if not lacks and not others:
            return found
        if name not in self._made:
            self._made[name] = Elsewhere(found, frozenset(lacks.split()), others)
        return self._made[name]

    def imported(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """builtins.__import__."""
        found = _import(name, globals, locals, fromlist or (), level)
        if level or globals is None or not str(globals.get("__name__")).startswith("megamoe"):
            return found
        if fromlist or "." not in name:
            return self.bring(name, found)
        self.bring(name, sys.modules[name])  # import a.b brings a
        return self.bring(name.partition(".")[0], found)


def _hidden(path: Any) -> bool:
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
    return isinstance(text, str) and f"{text}/".startswith(tuple(f"{each}/" for each in _HIDDEN))


def _not_hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a path that finds nothing in Linux's own folders."""

    def found(path: Any = ".", *args: Any, **others: Any) -> Any:
        if _hidden(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return function(path, *args, **others)

    return found


def _by_name(function: Callable[..., Any], system: str) -> Callable[..., Any]:
    """open(), in the encoding of that system where none is named."""

    def opened(file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, *rest: Any) -> Any:
        if system == "win32" and "b" not in mode and encoding in (None, "locale"):
            encoding = "cp1252"
        return function(file, mode, buffering, encoding, *rest)

    return opened


def _files(*, open_files_stay: bool) -> dict[str, Any]:
    """Functions of os on files. open_files_stay: a file that is open is neither removed nor replaced, as on Windows."""
    functions = {name: _not_hidden(getattr(os, name)) for name in ("stat", "lstat", "open", "readlink", "listdir")}
    functions["scandir"] = _not_hidden(os.scandir)
    if not open_files_stay:
        return functions

    def check(*paths: Any) -> None:
        numbers = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
        there = {os.path.realpath(each) for each in numbers if os.path.lexists(each)}
        with open("/proc/self/maps", encoding="utf-8") as maps:  # a file that is mapped is open too
            there |= {line.split(maxsplit=5)[5].rstrip() for line in maps if "/" in line}
        for path in paths:
            if os.path.realpath(path) in there:
                raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))

    def replace(source: Any, target: Any, **others: Any) -> None:
        check(source, target)
        os.replace(source, target, **others)

    def rename(source: Any, target: Any, **others: Any) -> None:
        check(source, target)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target, **others)

    def unlink(path: Any, **others: Any) -> None:
        check(path)
        os.unlink(path, **others)

    return {**functions, "replace": replace, "rename": rename, "unlink": unlink, "remove": unlink}


def _needs_a_name(library: type) -> type:
    class CDLL(library):  # type: ignore[misc]
        def __init__(self, name: str | None, *args: Any, **others: Any) -> None:
            if name is None:
                raise TypeError("bad argument type for built-in operation")  # as LoadLibrary() has it
            super().__init__(name, *args, **others)

    return CDLL


def _only_some(signals: Any) -> Callable[..., Any]:
    """signal.signal(), for the signals that Windows has."""
    known = {signals.SIGABRT, signals.SIGFPE, signals.SIGILL, signals.SIGINT, signals.SIGSEGV, signals.SIGTERM}

    def handled(number: int, handler: Any) -> Any:
        if number not in known:
            raise ValueError("invalid signal value")
        return signals.signal(number, handler)

    return handled


def _spawn_alone(method: str | None = None, **_: Any) -> Any:
    if method not in (None, "spawn"):
        raise ValueError(f"cannot find context for {method!r}")
    return _import("multiprocessing").get_context("spawn")


if os.environ.get("MEGAMOE_SYSTEM") in LACKS:
    builtins.__import__ = System(os.environ["MEGAMOE_SYSTEM"]).imported
