"""Fits kernels that have a profile of their own, each to every other of its rows in docs/data/holdouts.csv.

python -m benchmarks.fit_kernels                                       # prints the constants; a minute
python -m benchmarks.fit_kernels --write docs/data/kernel_fit.json     # also for the test that holds profiles to them

The first, the third, ... row of a kernel is fitted, the others are kept for docs/accuracy.md. What is not fitted comes
from the profile that a kernel's extends, or from the kernel's source.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence

from benchmarks.command import new_file, run
from benchmarks.fit_layer import Constants, Sample, fit, table
from megamoe.catalog import Hardware, Profile, load_profile
from megamoe.catalog.schema import Figure
from megamoe.planner.validation.tables import Measured
from megamoe.planner.validation.validate import Errors, compare

KERNELS = {  # profile -> what of it is fitted
    "flashinfer-nvfp4": ("feed_ps", "epilogue_ps", "memory_efficiency", "overlap", "fixed_us", "slot_us"),
    "flashinfer-mxfp8": ("memory_efficiency",),
    "flashinfer-bf16": ("memory_efficiency",),
    "flashinfer-sm90": ("memory_efficiency",),
    "flashinfer-sm90-blockwise": ("memory_efficiency", "feed_ps"),
    "deepgemm-sm90-unswapped": (),
    "deepgemm-sm90-overlapped": ("overlap",),
}


def rows_of(name: str) -> tuple[list[Measured], list[Measured]]:
    """The rows of a kernel that are fitted, and those that are kept: all of them where nothing is fitted."""
    rows = [row for row in table("holdouts") if row.profile == name]
    return (rows[::2], rows[1::2]) if KERNELS[name] else ([], rows)


def fitted(name: str) -> Constants:
    """The constants of one kernel by their keys, such as fixed_us."""
    if not KERNELS[name]:
        return {}
    found = fit([f"{name}.{key}" for key in KERNELS[name]], [Sample(row, 1.0) for row in rows_of(name)[0]], of=_with)
    return {key.partition(".")[2]: value for key, value in found.items()}


def _with(constants: Constants) -> Callable[[Hardware], Profile]:
    """One kernel's profile with these constants in place, for any device."""
    name = next(iter(constants)).partition(".")[0]
    figures = {
        key.partition(".")[2]: Figure(value=value, tag="derived", source="fitted") for key, value in constants.items()
    }
    changed = load_profile(name).model_copy(update=figures)
    return lambda _hardware: changed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=new_file, help="the JSON file to write")
    asked = parser.parse_args(arguments)
    found = {name: fitted(name) for name in KERNELS}
    for name, constants in found.items():
        print(f"{name:26} {', '.join(f'{key} {value:g}' for key, value in constants.items()) or 'nothing'}")
        for which, rows in zip(("fitted", "kept"), rows_of(name), strict=True):
            profile_of = _with({f"{name}.{key}": value for key, value in constants.items()}) if constants else None
            if rows:
                errors = Errors.of(compare(rows, profile_of))
                print(f"  {which} {errors.rows}: {errors.median_abs_pct_error:.1f} %, {errors.max_abs_pct_error:.1f} %")
    if asked.write:
        asked.write.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
