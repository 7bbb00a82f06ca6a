"""Compiles every kernel for every chip with no chip at hand, and reads from what comes out whether it is fit to run.

    python -m megamoe.kernels.ahead                            all of them, a table to the terminal
    python -m megamoe.kernels.ahead --write docs/kernels.md    the same into a file
    python -m megamoe.kernels.ahead --kernel quantize --target cuda:90

A kernel is fit when it keeps nothing in local memory, its shared and tensor memory are within the chip's, and it
multiplies with the instruction that it should. Tiles that were found on a device (`tuned`) are compiled with those of
its chip. Exit code 1 where one is not fit, 2 for a name that does not exist.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import date
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from megamoe.kernels import KERNELS, load
from megamoe.kernels.chips.sass import product_loop
from megamoe.kernels.chips.targets import KIB, OPTIONS, TARGETS, Build, Target, target
from megamoe.paths import path_of, write_whole

_MATRIX = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_s?mfma)[\w.:]*")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes and does.

    registers        of a thread; on gfx950 vector registers, those for accumulation among them
    local_bytes      of a thread: stack, and registers that did not fit
    shared_bytes     of a block
    tensor_columns   of tensor memory of a block
    instructions     matrix instructions by name, and how often each stands in the code
    warnings         what the assembler says of performance that is lost
    loop             on SM90, instructions of the loop of a product by opcode, of a warp and step of K
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    tensor_columns: int
    instructions: Mapping[str, int]
    warnings: tuple[str, ...] = ()
    loop: Mapping[str, int] | None = None

    @property
    def step(self) -> int | None:
        """Instructions that a warp issues for a step of K."""
        return None if self.loop is None else sum(self.loop.values())


@dataclass(frozen=True, slots=True)
class Compiled:
    """One build of an operation on a target, and what came out."""

    operation: str
    target: Target
    build: Build
    resources: Resources

    @property
    def problems(self) -> list[str]:
        """Why it is not fit to run, empty where it is."""
        found, chip = self.resources, self.target
        reasons = [f"the assembler warns: {each}" for each in found.warnings]
        if found.local_bytes:
            reasons.append(f"{found.local_bytes} bytes in local memory")
        if found.shared_bytes > chip.shared_bytes:
            reasons.append(f"{found.shared_bytes} bytes of shared memory, the chip has {chip.shared_bytes}")
        if found.tensor_columns > chip.tensor_columns:
            reasons.append(f"{found.tensor_columns} columns of tensor memory, the chip has {chip.tensor_columns}")
        if self.build.instruction and not any(self.build.instruction in name for name in found.instructions):
            reasons.append(f"no {self.build.instruction} in it, but {', '.join(found.instructions) or 'none at all'}")
        return [f"{self.operation} {self.build.label} on {chip.name}: {reason}" for reason in reasons]

    @property
    def instructions_a_weight(self) -> float | None:
        """Of all threads together, for each of the tile's COLUMNS x DEPTH weights; None where no loop was read."""
        if self.resources.step is None:
            return None
        constants = self.build.constants  # of the mega-kernel the layout has the tile's columns
        columns = constants["L"].columns if "L" in constants else constants["COLUMNS"]
        weights: int = columns * constants["DEPTH"]
        return self.resources.step * self.build.num_warps * self.target.warp_size / weights


def compile_ahead(operation: str, chip: Target) -> Iterator[Compiled]:
    """Every build of an operation on a chip, compiled anew.

    ValueError for a name that does not exist, RuntimeError where a build does not compile.
    """
    for build in load(operation).builds(chip):
        yield Compiled(operation, chip, build, compile_build(build, chip))


def compile_build(build: Build, chip: Target) -> Resources:
    """Compiles one build. RuntimeError where it does not, ValueError where Triton is set to interpret."""
    if not isinstance(build.kernel, JITFunction):
        raise ValueError("kernels cannot be compiled where TRITON_INTERPRET is set")
    names = list(build.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned}
    source = ASTSource(build.kernel, dict(build.signature), dict(build.constants), attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, **OPTIONS, **build.options}
    with _fresh() as log:
        try:
            compiled = triton.compile(source, GPUTarget(chip.backend, chip.arch, chip.warp_size), options)
        except Exception as failed:  # of whatever kind each stage of the compiler raises
            raise RuntimeError(f"{build.label} does not compile for {chip.name}: {failed}") from failed
    return _resources(compiled, log.getvalue())


@contextmanager
def _fresh() -> Iterator[io.StringIO]:
    """Has Triton compile whatever it compiled before, and tell what its assembler says."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="megamoe-kernels-") as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        with redirect_stdout(log):
            yield log


def _resources(compiled: Any, log: str) -> Resources:
    assembly = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    registers, local_bytes = _of_ptxas(log) if "ptx" in compiled.asm else _of_amdgcn(assembly)
    has_loop = "wgmma.mma_async" in assembly
    return Resources(
        registers,
        local_bytes,
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", None) or 0,
        Counter(_MATRIX.findall(assembly)),
        tuple(line.strip() for line in log.splitlines() if "Potential Performance Loss" in line),
        product_loop(compiled.asm["sass"]) if has_loop else None,
    )


def _of_ptxas(log: str) -> tuple[int, int]:
    """Registers and bytes of local memory.

    "16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads ... Used 255 registers"  ->  255, 32
    """
    return _number(r"Used (\d+) registers", log), sum(
        _number(rf"(\d+) bytes {what}", log) for what in ("stack frame", "spill stores", "spill loads")
    )


def _of_amdgcn(assembly: str) -> tuple[int, int]:
    """The same from the metadata at the assembly's end; a spilled register is 4 bytes, and then scratch is not 0."""
    return _number(r"\.vgpr_count:\s+(\d+)", assembly), _number(r"\.private_segment_fixed_size: (\d+)", assembly)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler said nothing that looks like {pattern!r}")
    return int(found.group(1))


# ---- the table ----

_HEADER = """\
# Kernels, compiled

What each Triton kernel takes on the chips it is compiled for, none of which need be there: registers of a thread,
KiB of shared memory of a block, and the matrix instructions in the code with how often each stands there; for SM90 also
what the loop of a product has: instructions of a warp and step of K, and of all threads for each weight. None keeps
anything in local memory. Nothing here says how long a kernel takes.

    python -m megamoe.kernels.ahead --write docs/kernels.md

Triton {version}, {today}.
"""


_COLUMNS = ("operation", "tile", "warps", "stages", "registers", "shared KiB", "matrix instructions")


def table(compiled: Iterable[Compiled], today: date) -> str:
    """Markdown: one table for each target."""
    parts, rows = [_HEADER.format(version=triton.__version__, today=today)], list(compiled)
    for chip in TARGETS:
        here = [_row(each) for each in rows if each.target == chip]
        if here:
            columns = (*_COLUMNS, *(("a step", "a weight") if chip.name == "cuda:90" else ()))
            heading = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
            parts.append(f"\n## {chip.name}\n\n{heading}" + "".join(here))
    return "".join(parts)


def _row(compiled: Compiled) -> str:
    build, found = compiled.build, compiled.resources
    instructions = ", ".join(f"{count} `{name}`" for name, count in sorted(found.instructions.items()))
    numbers = (build.num_warps, build.num_stages, found.registers, f"{found.shared_bytes / KIB:.4g}")
    cells = [compiled.operation, build.label, *map(str, numbers), instructions]
    if compiled.target.name == "cuda:90":
        weight = compiled.instructions_a_weight
        cells += ["-", "-"] if weight is None else [str(found.step), f"{weight:.2f}"]
    return f"| {' | '.join(cells)} |\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command -> exit code"""
    parser = argparse.ArgumentParser(prog="python -m megamoe.kernels.ahead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernel", action="append", choices=tuple(KERNELS), help="only this one; may be repeated")
    parser.add_argument("--target", action="append", choices=[each.name for each in TARGETS], help="likewise")
    parser.add_argument("--write", type=path_of, metavar="FILE", help="where the table goes, else to the terminal")
    asked = parser.parse_args(arguments)
    chips = [target(name) for name in asked.target] if asked.target else TARGETS
    compiled = [each for name in asked.kernel or KERNELS for chip in chips for each in compile_ahead(name, chip)]
    problems = [problem for each in compiled for problem in each.problems]
    sys.stderr.writelines(f"not fit to run: {problem}\n" for problem in problems)
    text = table(compiled, date.today())
    if not asked.write:
        sys.stdout.write(text)
    elif not problems:
        write_whole(asked.write, text)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
