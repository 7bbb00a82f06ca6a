"""What loading read, how long it took, and what rounding cost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megamoe.catalog.wording import plural, size


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes read of bytes to be read, of each rank."""

    read: tuple[int, ...]
    total: tuple[int, ...]

    def __str__(self) -> str:
        return f"read {size(sum(self.read))} of {size(sum(self.total))} on {plural(len(self.read), 'rank')}"


@dataclass(slots=True)
class LoadReport:
    """What this rank read of a checkpoint.

    bytes_read, bytes_total    of its experts and of what every rank has; bytes in all files
    expert_bytes, dense_bytes  bytes_read, by what they are
    experts_read, experts_kept numbers of experts, over all blocks
    seconds                    of reading and packing, on this rank
    weight_formats             of each block's experts
    quantization_error         of each block: ||rounded - weight|| / ||weight|| over this rank's experts that were read;
                               blocks that nothing was rounded in are left out
    unused                     tensors of the checkpoint that the model has no place for
    """

    bytes_read: int = 0
    bytes_total: int = 0
    expert_bytes: int = 0
    dense_bytes: int = 0
    experts_read: int = 0
    experts_kept: int = 0
    seconds: float = 0.0
    weight_formats: dict[str, str] = field(default_factory=dict)
    quantization_error: dict[str, float] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        rate = self.bytes_read / self.seconds / 1e9 if self.seconds else 0.0
        said = f"read {size(self.bytes_read)} of {size(self.bytes_total)} in {self.seconds:.1f} s ({rate:.2f} GB/s)"
        if not self.quantization_error:
            return said
        worst = max(self.quantization_error, key=self.quantization_error.__getitem__)
        return f"{said}; experts were rounded, by at most {self.quantization_error[worst]:.2%} in {worst}"


@contextmanager
def shown(callback: Callable[[Progress], None] | None, rank: int) -> Iterator[Callable[[Progress], None]]:
    """What is to be called with each Progress: the callback, or a bar on rank 0's stderr where that is a terminal."""
    if callback is not None:
        yield callback
        return
    if rank or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading")
        yield lambda progress: bar.update(task, completed=sum(progress.read), total=sum(progress.total))
