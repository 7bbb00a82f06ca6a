"""What a machine's file of the catalog says: the constants by which this package's own layer is planned on it."""

from __future__ import annotations

from pydantic import PositiveInt, model_validator
from typing_extensions import Self

from megamoe.catalog.schema import Entry, Figure


class Machine(Entry):
    """One machine that runs this package's layer, rank by rank, over a process group; see schedule/machine.py.

    cores                 of the machine, which all ranks share         threads_per_rank   that each rank computes with
    product_gflops        of one rank's expert products                 value_ns           moving a value of a row
    weight_ns             reading a BF16 weight, once a product         decode_ns          making an MXFP4 weight BF16
    round_ns              rounding a value to MXFP8 and back
    call_us               a call, whatever it does                      wave_us            a stretch of work more
    link_efficiency       of a link's nominal rate                      burst_us           that a link takes at once
    loopback_gb_s         where ranks are joined by no link             exchange_us        a message more
    byte_ns               of a core's time, for every byte that a rank sends or receives
    link_share            of a core, taken by the threads that move bytes while a shaped link carries any
    gradient_ns           writing a weight's gradient, in a backward, and what turning rows into columns costs for it

    Of calls of few tokens, which go without waves; None where nobody has measured it (schedule/small.py):
    small_call_us         a call, whatever it does
    small_gflops, small_packed_gflops  of one rank's products of few rows, with BF16 and with MXFP4 weights
    small_weight_ns, small_decode_ns   a weight of either format that lies in a cache
    small_memory_ns       a byte of weights that comes from memory, where a cache of cache_mb does not hold all ranks'
    small_exchange_us     an exchange of pages or of results        small_byte_ns   a byte that a rank sends
    """

    name: str
    title: str
    fitted: str
    device: str = "cpu"
    cores: PositiveInt
    threads_per_rank: PositiveInt
    product_gflops: Figure
    weight_ns: Figure
    decode_ns: Figure
    value_ns: Figure
    round_ns: Figure
    call_us: Figure
    wave_us: Figure
    link_efficiency: Figure
    burst_us: Figure
    loopback_gb_s: Figure
    exchange_us: Figure
    byte_ns: Figure
    link_share: Figure
    gradient_ns: Figure
    small_call_us: Figure | None = None
    small_gflops: Figure | None = None
    small_packed_gflops: Figure | None = None
    small_weight_ns: Figure | None = None
    small_decode_ns: Figure | None = None
    small_memory_ns: Figure | None = None
    cache_mb: Figure | None = None
    small_exchange_us: Figure | None = None
    small_byte_ns: Figure | None = None

    @model_validator(mode="after")
    def _checked(self) -> Self:
        for key in ("product_gflops", "link_efficiency", "loopback_gb_s", "small_gflops", "small_packed_gflops"):
            figure = getattr(self, key)
            if figure is not None and figure.value == 0:
                raise ValueError(f"{key} is divided by and cannot be 0")
        return self
