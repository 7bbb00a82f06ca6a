"""Kernels compiled for chips that are not here: what comes out is fit to run there, and what is not is noticed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import cache, lru_cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megamoe.kernels import KERNELS, load
from megamoe.kernels.ahead import Compiled, Resources, compile_build, main, table
from megamoe.kernels.chips.sass import product_loop
from megamoe.kernels.chips.targets import TARGETS, Build, Target, target
from megamoe.kernels.mega.signals import at
from tests.ahead_builds import AheadBuilds

ROOT = Path(__file__).parents[1]
by_target = pytest.mark.parametrize("chip", TARGETS, ids=lambda chip: chip.name)


Compile = Callable[[str, Target], list[Compiled]]


@pytest.fixture(scope="module")
def compiled(ahead_builds: AheadBuilds) -> Compile:
    """Every build of an operation on a chip, with what came out."""

    @cache
    def found(operation: str, chip: Target) -> list[Compiled]:
        builds, made = load(operation).builds(chip), ahead_builds.result(operation, chip.name)
        return [Compiled(operation, chip, build, each) for build, each in zip(builds, made, strict=True)]

    return found


# ---- what ships ----


@by_target
@pytest.mark.parametrize("operation", KERNELS)
def test_every_build_of_every_operation_is_fit_to_run(compiled: Compile, operation: str, chip: Target) -> None:
    builds = compiled(operation, chip)
    assert builds
    assert [problem for each in builds for problem in each.problems] == []


@by_target
@pytest.mark.parametrize("operation", [name for name in KERNELS if name == "mega" or name.startswith("grouped")])
def test_products_use_the_matrix_instruction_of_the_chip(compiled: Compile, operation: str, chip: Target) -> None:
    for each in compiled(operation, chip):
        assert any(name.startswith(chip.instruction) for name in each.resources.instructions), each.build.label


@pytest.mark.parametrize("operation", ["grouped_linear1", "grouped_linear2"])
def test_few_rows_are_decoded_in_fewer_instructions_than_memory_leaves_time_for(
    compiled: Compile, operation: str
) -> None:
    """An H200's memory delivers a weight in the time of 4.1 thread-instructions."""
    found = {each.build.label: each for each in compiled(operation, target("cuda:90")) if " wide" in each.build.label}
    decode = found["V4-Pro wide 16x128x128"]
    assert decode.instructions_a_weight is not None
    assert decode.instructions_a_weight <= 3.8
    large = next(each for label, each in found.items() if "scales above" in label)
    assert large.resources.loop is not None
    assert large.resources.loop["HMUL2"] == 2 * found["V4-Pro wide 64x128x128"].resources.loop["HMUL2"]  # type: ignore[index]


@pytest.mark.parametrize("operation", ["grouped_linear1", "grouped_linear2", "mega"])
def test_all_that_a_step_reads_is_copied_ahead(compiled: Compile, operation: str) -> None:
    for each in compiled(operation, target("cuda:90")):
        loop = each.resources.loop
        assert loop is not None, each.build.label
        assert loop["HGMMA"] > 0
        assert loop["LDGSTS"] > 0
        assert loop["LDG"] == 0, each.build.label


def test_the_loop_is_the_smallest_one_that_multiplies() -> None:
    code = """
Function:kernel
--:-:-:-:1\tMOV R1, R2;
LBB1:
--:-:-:-:1\t@!P0 LDG.E R3, desc[UR8][R4.64];
LBB0:
04:-:-:Y:4\tIMAD.SHL.U32 R1, R2, 0x8, RZ;
--:-:-:-:1\tHGMMA.64x16x16.F32.BF16 R32, R72, gdesc[UR12], R32;
--:-:-:-:5\t@!P0 BRA LBB0;
LBB3:
--:-:-:-:5\t@P1 BRA LBB3;
--:-:-:-:5\t@!P0 BRA LBB1;
--:-:-:-:5\tBRA LBB2;
LBB2:
"""
    assert product_loop(code) == {"IMAD": 1, "HGMMA": 1, "BRA": 1}
    assert product_loop(code.replace("HGMMA", "FFMA")) is None


@pytest.mark.parametrize("operation", KERNELS)
def test_builds_have_labels_of_their_own_and_say_what_every_parameter_is(operation: str) -> None:
    for chip in TARGETS:
        builds = load(operation).builds(chip)
        assert len({each.label for each in builds}) == len(builds)
        for each in builds:
            assert list(each.signature) == each.kernel.arg_names
            assert set(each.constants) == {name for name, kind in each.signature.items() if kind == "constexpr"}
            assert each.aligned <= set(each.signature) - set(each.constants)


@pytest.mark.parametrize("operation", KERNELS)
def test_a_launch_asks_for_what_was_built_wherever_a_part_of_a_buffer_begins(operation: str) -> None:
    """A pointer that a build takes for aligned is so in all launches, or Triton compiles once more inside a call."""
    for chip in TARGETS:
        for build in load(operation).builds(chip):
            pointers = {name for name, kind in build.signature.items() if kind.startswith("*")}
            anywhere = {each.name for each in build.kernel.params if each.do_not_specialize_on_alignment}
            assert pointers & build.aligned == pointers - anywhere, build.label


def test_the_table_in_the_docs_has_a_row_for_every_build() -> None:
    written = (ROOT / "docs" / "kernels.md").read_text()
    for chip in TARGETS:
        section = written.partition(f"## {chip.name}\n")[2].partition("\n## ")[0]
        rows = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in section.splitlines() if "|" in line}
        builds = {(operation, each.label) for operation in KERNELS for each in load(operation).builds(chip)}
        assert builds == {row for row in rows if row[0] in KERNELS}


@triton.jit
def copy_rows(bases, out, DIVISOR: tl.constexpr):
    """Rows of 128 BF16 from 16 addresses, each to another."""
    rows, columns = tl.arange(0, 16), tl.arange(0, 128)
    begin, end = at(tl.load(bases + rows), 0, tl.bfloat16, DIVISOR), at(tl.load(out + rows), 0, tl.bfloat16, DIVISOR)
    tl.store(end[:, None] + columns[None, :], tl.load(begin[:, None] + columns[None, :]))


@pytest.mark.parametrize(("divisor", "accesses"), [(32, ("ld.global.v4", "st.global.v4")), (1, ("ld.global.b16",))])
def test_rows_at_addresses_that_16_divides_are_read_and_written_by_16_bytes(
    divisor: int, accesses: tuple[str, ...]
) -> None:
    """Else the mega-kernel pulls and pushes by single values, with an address in registers for each of them."""
    signature = {"bases": "*i64", "out": "*i64", "DIVISOR": "constexpr"}
    compiled = triton.compile(ASTSource(copy_rows, signature, {"DIVISOR": divisor}), GPUTarget("cuda", 90, 32))
    for access in accesses:
        assert access in compiled.asm["ptx"]
    assert ("st.global.b16" in compiled.asm["ptx"]) == (divisor == 1)


# ---- what would be noticed ----


@triton.jit
def hoard(source, out, SIZE: tl.constexpr):
    """Holds on to more than the registers that it is given."""
    places = tl.arange(0, SIZE)
    values = tl.load(source + places)
    tl.store(out + places, values + tl.sum(values * values, 0) * tl.cumsum(values, 0))


@triton.jit
def multiply(x, w, out, STEPS: tl.constexpr, SIZE: tl.constexpr):
    """x [SIZE, STEPS * SIZE] @ w [STEPS * SIZE, SIZE]"""
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(STEPS):
        piece = tl.load(x + rows * (STEPS * SIZE) + step * SIZE + columns)
        total += tl.dot(piece, tl.load(w + (step * SIZE + rows) * SIZE + columns))
    tl.store(out + rows * SIZE + columns, total)


HOARD = Build(
    label="hoard",
    kernel=hoard,
    signature={"source": "*fp32", "out": "*fp32", "SIZE": "constexpr"},
    constants={"SIZE": 8192},
    aligned=frozenset({"source", "out"}),
    num_warps=1,
)
FEW_REGISTERS = {"cuda": {"maxnreg": 32}, "hip": {"waves_per_eu": 8}}
MULTIPLY = Build(
    label="multiply",
    kernel=multiply,
    signature={"x": "*bf16", "w": "*bf16", "out": "*fp32", "STEPS": "constexpr", "SIZE": "constexpr"},
    constants={"STEPS": 8, "SIZE": 128},
    aligned=frozenset({"x", "w", "out"}),
    num_warps=8,
    num_stages=2,
)


def problems(build: Build, chip: Target, found: Resources | None = None) -> str:
    return "; ".join(Compiled("test", chip, build, found or compile_build(build, chip)).problems)


@lru_cache
def multiplied(chip: Target) -> Resources:
    return compile_build(MULTIPLY, chip)


@by_target
def test_local_memory_is_noticed(chip: Target) -> None:
    assert "bytes in local memory" in problems(replace(HOARD, options=FEW_REGISTERS[chip.backend]), chip)


@by_target
def test_shared_memory_beyond_the_chip_is_noticed(chip: Target) -> None:
    found = multiplied(chip)
    assert problems(replace(MULTIPLY, instruction=chip.instruction), chip, found) == ""
    assert 0 < found.shared_bytes < chip.shared_bytes
    said = problems(MULTIPLY, replace(chip, shared_bytes=found.shared_bytes - 1), found)
    assert f"{found.shared_bytes} bytes of shared memory, the chip has {found.shared_bytes - 1}" in said


def test_tensor_memory_is_counted() -> None:
    chip = target("cuda:100")
    found = multiplied(chip)
    assert 0 < found.tensor_columns <= chip.tensor_columns
    said = problems(MULTIPLY, replace(chip, tensor_columns=found.tensor_columns - 1), found)
    assert f"{found.tensor_columns} columns of tensor memory" in said


@by_target
def test_a_product_by_another_instruction_is_noticed(chip: Target) -> None:
    asked = replace(MULTIPLY, instruction="no_such_instruction")
    assert f"no no_such_instruction in it, but {chip.instruction}" in problems(asked, chip, multiplied(chip))
    none = replace(HOARD, constants={"SIZE": 256}, instruction=chip.instruction)
    assert problems(none, chip).endswith(f"no {chip.instruction} in it, but none at all")


def test_what_the_assembler_says_of_lost_performance_is_noticed() -> None:
    chip, warning = target("cuda:90"), "(C7510) Potential Performance Loss: wgmma serialized"
    warned = replace(multiplied(chip), warnings=(warning,))
    assert problems(MULTIPLY, chip, warned) == f"test multiply on cuda:90: the assembler warns: {warning}"


def test_what_does_not_compile_is_named_with_its_target() -> None:
    with pytest.raises(RuntimeError, match="multiply does not compile for cuda:90"):
        compile_build(replace(MULTIPLY, constants={"STEPS": 1, "SIZE": 100}), target("cuda:90"))


# ---- the command, and what importing costs ----


def test_the_command_writes_what_it_compiled(
    compiled: Compile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "kernels.md"
    assert main(["--kernel", "reduce_slots", "--target", "hip:gfx950", "--write", str(written)]) == 0
    assert capsys.readouterr().out == ""
    assert written.read_text() == table(compiled("reduce_slots", target("hip:gfx950")), date.today())
    assert main(["--kernel", "reduce_slots", "--target", "hip:gfx950"]) == 0
    assert capsys.readouterr().out == written.read_text()


@pytest.mark.parametrize("asked", [["--kernel", "reduce"], ["--target", "cuda:80"]], ids=" ".join)
def test_the_command_refuses_names_that_do_not_exist(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(asked)
    assert f"invalid choice: '{asked[1]}'" in capsys.readouterr().err


def test_unknown_names_are_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"no kernel is called 'reduce'; there are quantize, .*reduce_slots"):
        load("reduce")
    with pytest.raises(ValueError, match=r"no target is called 'cuda:80'; there are cuda:90, cuda:100, hip:gfx950"):
        target("cuda:80")


def test_importing_the_package_imports_neither_triton_nor_torch() -> None:
    code = "import sys, megamoe.kernels; print([name for name in ('torch', 'triton') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=True).stdout
    assert printed.strip() == b"[]"
