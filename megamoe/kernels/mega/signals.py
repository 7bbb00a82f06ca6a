"""Counters between the programs of a kernel and between ranks: set and awaited by atomics, within a deadline.

Triton 3.6 gives loads and stores neither order nor scope, so every counter is read and written by atomics, and what a
counter tells of is written by plain stores before a barrier of the block. A release at the scope of the system covers
what all threads of the block stored before the barrier (PTX ISA, "Memory Consistency Model"; AMDGPU's likewise).
"""

from __future__ import annotations

import time

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer
from triton.language.extra.hip import memrealtime

_PAUSE_S = 0.004


@triton.jit
def at(base, offset, TYPE: tl.constexpr, DIVISOR: tl.constexpr = 1):
    """Pointers of a type to `offset` bytes beyond an address, int64 of any shape; DIVISOR divides all of them.

    It is for the compiler, which else reads and writes by single values, and Triton 3.6 loses what a caller says of a
    function's result.
    """
    pointers = (base + offset).to(tl.pointer_type(TYPE))
    if DIVISOR > 1:
        pointers = tl.multiple_of(pointers, DIVISOR)
    return pointers


def host_time_ns() -> int:
    """Nanoseconds of the host, for a kernel that Triton interprets; others of the machine run meanwhile."""
    time.sleep(_PAUSE_S)
    return time.monotonic_ns()


# the compiler asks what the function is, and never comes to where it is called
host_time_ns.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def now_ns(CLOCK: tl.constexpr):
    """Nanoseconds of the chip's clock; in Triton's interpreter, of the host's."""
    if CLOCK == "cuda":
        return globaltimer()
    elif CLOCK == "hip":  # noqa: RET505  Triton compiles what follows a return
        return memrealtime() * 10  # 100 MHz
    else:
        return host_time_ns()


@triton.jit
def add(counter, amount, SCOPE: tl.constexpr):
    """Adds to a counter, or to several, after all that this block has stored."""
    tl.debug_barrier()
    tl.atomic_add(counter, amount, sem="release", scope=SCOPE)


@triton.jit
def wait_for(counter, least, end_ns, stuck, CLOCK: tl.constexpr):
    """Waits for a counter of this rank to come to `least`; where it does not until end_ns, sets `stuck` and goes on.

    What comes after reads memory that is there, and garbage: the host learns of it and drops the call's output.
    """
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while (seen < least) & (now_ns(CLOCK) < end_ns):
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    if seen < least:
        tl.store(stuck, 1)
    tl.debug_barrier()


@triton.jit
def wait_for_all(counters, least, wanted, end_ns, CLOCK: tl.constexpr):
    """Waits for the wanted ones of counters that peers write, [N], to come to `least` -> their values, which are late.

    counters [3, 8, 5], least [4, 4, 9], wanted [1, 1, 0], nobody writes any more  ->  [3, 8, .], [1, 0, 0]
    """
    zeros = tl.zeros(counters.shape, tl.int64)
    seen = tl.atomic_add(counters, zeros, mask=wanted, sem="acquire", scope="sys")
    late = wanted & (seen < least)
    while (tl.max(late.to(tl.int32), 0) > 0) & (now_ns(CLOCK) < end_ns):
        seen = tl.atomic_add(counters, zeros, mask=wanted, sem="acquire", scope="sys")
        late = wanted & (seen < least)
    tl.debug_barrier()
    return seen, late
