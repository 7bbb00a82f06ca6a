"""A path's library: its functions on tensors, and the test that it passes on this machine before it is used."""

# n rows   M rows of x   K inputs   N outputs   H hidden   I intermediate   T tokens

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megamoe.formats import MXFP4, MXFP8, dequantize_mxfp4, quantize_mxfp4, unpack_e2m1
from megamoe.kernels.cpu.build import BuildError, build, is_built
from megamoe.kernels.cpu.layout import MXFP4Blocks, pack_bf16, pack_mxfp4
from megamoe.kernels.cpu.paths import Path, worthwhile
from megamoe.kernels.gating import Tables

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
ELSEWHERE = "set TORCH_EXTENSIONS_DIR to a folder of a file system that is not mounted noexec"
_SIGNATURES = {
    "products": (
        *(_POINTER, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG),
        *(_LONG, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _INT, _INT),
    ),
    "quantize": (_POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _INT),
    "dequantize": (_POINTER, _LONG, _POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _INT),
    "round": (_POINTER, _LONG, _LONG, _LONG, _POINTER, _LONG, _INT),
    "activate": (*(_POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER, _POINTER, _FLOAT, _FLOAT, _INT, _POINTER, _INT),),
    "add_bias": (*(_POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _INT),),
    "activate_backward": (
        *(_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _FLOAT),
        *(_INT, _POINTER, _POINTER, _INT),
    ),
    "turn_rows": (_POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER, _LONG, _INT),
    "pack_rows": (_POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER, _LONG, _INT),
    "reduce_slots": (_POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER, _INT),
    "reduce_mxfp8_slots": (*(_POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _POINTER, _INT),),
    "read": (_POINTER, _LONG),
    "count_rows": (_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _POINTER),
    "sort_slots": (_POINTER, _POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER),
    "few_bytes": (),
    "few_bring": (_POINTER,),
    "few_route": (_POINTER,),
    "few_compute": (_POINTER,),
    "few_reduce": (_POINTER,),
    "send_once": (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER),
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a product, sorted by expert.

    x        [M, K] bfloat16, each row contiguous
    counts   [experts] int64: rows of each expert, n in all
    source   [n] int64: which row of x each row is; None where they are x's own in order
    """

    x: Tensor
    counts: Tensor
    source: Tensor | None = None


class Library:
    """The functions of one path. All of them write where they are told to and return nothing."""

    def __init__(self, path: Path, file: str) -> None:
        self.path = path
        loaded = ctypes.CDLL(file)
        self._functions = {}
        for name, types in _SIGNATURES.items():
            function = getattr(loaded, f"megamoe_{name}")
            function.argtypes, function.restype = types, _INT if name in ("few_bring", "few_bytes") else None
            self._functions[name] = function

    def __reduce__(self) -> tuple[Callable[[Path], Library], tuple[Path]]:
        """A copy, in this process or another, is the library that is loaded there."""
        return load, (self.path,)

    def products(
        self, rows: Rows, weights: MXFP4Blocks | Tensor, outputs: int, out: Tensor, goes: Tensor | None = None
    ) -> None:
        """Each row times its expert's matrix.

        weights  of all experts in order, as layout.py packs them: packed [experts, B, K/4, 64] and scales, or BF16
        out      [., N] bfloat16 or float32; row r goes to row goes[r] of it, goes [n] int64, by default to its own
        """
        packed, scales = weights if isinstance(weights, tuple) else (weights, None)
        x, counts = rows.x, rows.counts
        assert x.dtype == torch.bfloat16, x.dtype
        assert x.stride(1) == 1
        assert out.stride(1) == 1
        assert packed.is_contiguous()
        assert scales is None or scales.is_contiguous()
        assert counts.dtype == torch.int64
        assert counts.is_contiguous()
        assert len(counts) == len(packed)
        self._functions["products"](
            *(x.data_ptr(), x.stride(0), _pointer(rows.source), x.shape[1]),
            *(packed.data_ptr(), _pointer(scales), _bytes_of_one(packed), _bytes_of_one(scales), outputs),
            *(counts.data_ptr(), len(counts), out.data_ptr(), out.stride(0), _pointer(goes)),
            *(out.dtype == torch.float32, torch.get_num_threads()),
        )

    def quantize(self, x: Tensor, out: MXFP8, goes: Tensor | None = None) -> None:
        """x [n, K] bfloat16 rounded to MXFP8 [., K]; row r to row goes[r], goes [n] int64, by default to its own."""
        codes, scales = out.values, out.scales
        assert x.dtype == torch.bfloat16
        assert x.stride(1) == codes.stride(1) == scales.stride(1) == 1
        self._functions["quantize"](
            *(x.data_ptr(), x.stride(0), *x.shape, codes.data_ptr(), codes.stride(0)),
            *(scales.data_ptr(), scales.stride(0), _pointer(goes), torch.get_num_threads()),
        )

    def dequantize(self, q: MXFP8, out: Tensor) -> None:
        """q [n, K] as bfloat16 [n, K]."""
        codes, scales = q.values, q.scales
        assert out.dtype == torch.bfloat16
        assert out.stride(1) == codes.stride(1) == scales.stride(1) == 1
        self._functions["dequantize"](
            *(codes.data_ptr(), codes.stride(0), scales.data_ptr(), scales.stride(0), *out.shape),
            *(out.data_ptr(), out.stride(0), torch.get_num_threads()),
        )

    def round(self, x: Tensor, out: Tensor) -> None:
        """x [n, K] bfloat16 rounded to MXFP8, as bfloat16 [n, K]."""
        assert x.dtype == out.dtype == torch.bfloat16
        assert x.stride(1) == out.stride(1) == 1
        self._functions["round"](
            x.data_ptr(), x.stride(0), *x.shape, out.data_ptr(), out.stride(0), torch.get_num_threads()
        )

    def activate(self, gate_up: Tensor, weights: Tensor, tables: Tables, *, quantized: bool, out: Tensor) -> None:
        """ops.activate(): gate_up [n, 2I] or [n, I] bfloat16, weights [n] float32 -> out [n, I] bfloat16"""
        activation = tables.activation
        assert gate_up.is_contiguous()
        assert out.is_contiguous()
        assert weights.is_contiguous()
        assert gate_up.dtype == out.dtype == torch.bfloat16
        assert weights.dtype == tables.gate.dtype == torch.float32
        assert gate_up.shape[1] == activation.rows_per_output * out.shape[1]
        limit = activation.limit_of_up
        self._functions["activate"](
            *(gate_up.data_ptr(), weights.data_ptr(), *out.shape, activation.gated),
            *(tables.gate.data_ptr(), _pointer(tables.up), float("inf") if limit is None else limit),
            *(activation.up_shift, quantized, out.data_ptr(), torch.get_num_threads()),
        )

    def add_bias(
        self, sums: Tensor, bias: Tensor, counts: Tensor, out: Tensor, weights: Tensor | None, goes: Tensor | None
    ) -> None:
        """ops.add_bias(): sums [n, N] float32, bias [e, N] float32, counts [e] int64 -> out [., N] bfloat16"""
        given = (sums, bias, counts, *(each for each in (weights, goes) if each is not None))
        assert all(each.is_contiguous() for each in given), [each.stride() for each in given]
        assert sums.dtype == bias.dtype == torch.float32
        assert out.dtype == torch.bfloat16
        assert out.stride(1) == 1
        assert tuple(bias.shape) == (len(counts), sums.shape[1]), (bias.shape, counts.shape, sums.shape)
        self._functions["add_bias"](
            *(sums.data_ptr(), sums.shape[1], bias.data_ptr(), counts.data_ptr(), len(counts)),
            *(_pointer(weights), out.data_ptr(), out.stride(0), _pointer(goes), torch.get_num_threads()),
        )

    def reduce_slots(self, rows: Tensor | MXFP8, positions: Tensor, out: Tensor) -> None:
        """ops.reduce_slots(): rows [N + 1, H] bfloat16 or MXFP8, positions [T, K] int64 -> [T, H] bfloat16"""
        assert positions.is_contiguous()
        assert out.is_contiguous()
        assert out.dtype == torch.bfloat16
        assert positions.dtype == torch.int64
        if isinstance(rows, MXFP8):
            codes, scales = rows.values, rows.scales
            assert codes.stride(1) == scales.stride(1) == 1
            self._functions["reduce_mxfp8_slots"](
                *(codes.data_ptr(), codes.stride(0), scales.data_ptr(), scales.stride(0), codes.shape[1]),
                *(positions.data_ptr(), *positions.shape, out.data_ptr(), torch.get_num_threads()),
            )
            return
        assert rows.is_contiguous()
        assert rows.dtype == torch.bfloat16
        self._functions["reduce_slots"](
            rows.data_ptr(),
            rows.shape[1],
            positions.data_ptr(),
            *positions.shape,
            out.data_ptr(),
            torch.get_num_threads(),
        )

    def activate_backward(
        self,
        linear1: Tensor,
        weights: Tensor,
        gradient: Tensor,
        tables: tuple[Tables, Tensor, Tensor | None],
        *,
        quantized: bool,
        activated: Tensor,
        of_weights: Tensor,
    ) -> None:
        """training.derivatives.activate_backward(); tables: the activation's, f' and the derivative of up's factor."""
        given = (linear1, weights, gradient, activated, of_weights)
        assert all(each.is_contiguous() for each in given), [each.stride() for each in given]
        assert linear1.dtype == activated.dtype == torch.bfloat16
        assert weights.dtype == gradient.dtype == of_weights.dtype == torch.float32
        assert gradient.shape == activated.shape
        forward, gate_slope, up_slope = tables
        activation = forward.activation
        limit = activation.limit_of_up
        self._functions["activate_backward"](
            *(linear1.data_ptr(), weights.data_ptr(), gradient.data_ptr(), *gradient.shape, activation.gated),
            *(forward.gate.data_ptr(), gate_slope.data_ptr(), _pointer(forward.up), _pointer(up_slope)),
            *(float("inf") if limit is None else limit, activation.up_shift, quantized),
            *(activated.data_ptr(), of_weights.data_ptr(), torch.get_num_threads()),
        )

    def turn_rows(self, x: Tensor, source: Tensor | None, out: Tensor) -> None:
        """x [., C] bfloat16, source [n] int64 -> out [C, 32 ceil(n / 32)]: column r is row source[r], then zeros"""
        self._turn("turn_rows", x, source, out, out.shape[1])

    def pack_rows(self, x: Tensor, source: Tensor | None, out: Tensor) -> None:
        """The same as layout.pack_bf16() packs it: out [ceil(C / 32), 16 ceil(n / 32), 32, 2]"""
        self._turn("pack_rows", x, source, out, out.shape[1] * 2)

    def _turn(self, name: str, x: Tensor, source: Tensor | None, out: Tensor, pitch: int) -> None:
        assert x.dtype == out.dtype == torch.bfloat16
        assert x.stride(1) == 1 or x.shape[1] == 1
        assert out.is_contiguous()
        assert source is None or source.is_contiguous()
        num_rows = len(x) if source is None else len(source)
        assert pitch == -(-num_rows // 32) * 32, (pitch, num_rows)
        self._functions[name](
            *(x.data_ptr(), x.stride(0), _pointer(source), num_rows, x.shape[1]),
            *(out.data_ptr(), pitch, torch.get_num_threads()),
        )

    def count_rows(self, topk_ids: Tensor, rank_of: Tensor) -> Tensor:
        """messages.count_rows(): topk_ids [T, K] int64, rank_of [E] int64 -> [2, E] int64"""
        ids = topk_ids.contiguous()
        counts = torch.zeros(2, len(rank_of), dtype=torch.int64, device="cpu")
        self._functions["count_rows"](
            *(ids.data_ptr(), *ids.shape, rank_of.data_ptr(), len(rank_of)),
            *(counts[0].data_ptr(), counts[1].data_ptr()),
        )
        return counts

    def sort_slots(
        self, topk_ids: Tensor, topk_weights: Tensor, places: Tensor, num_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Slots by their experts' places: topk_ids [T, K] int64, topk_weights [T, K] float32, places [E + 1] int64.

        -> tokens [N] int64, weights [N] float32, positions [T, K] int64, as in rows.Route
        """
        ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
        tokens, positions = ids.new_empty(num_rows), torch.empty_like(ids)
        of_rows = weights.new_empty(num_rows)
        self._functions["sort_slots"](
            *(ids.data_ptr(), weights.data_ptr(), *ids.shape, places.data_ptr(), len(places) - 1, num_rows),
            *(tokens.data_ptr(), of_rows.data_ptr(), positions.data_ptr()),
        )
        return tokens, of_rows, positions

    def send_once(
        self, tokens: Tensor, segments: tuple[Tensor, Tensor], num_tokens: int, num_ranks: int, num_unique: int
    ) -> tuple[Tensor, Tensor]:
        """permutation._Sending.once(): tokens [n] int64; lengths [J] and (ranks, bases) [2, J] int64 of the segments.

        -> unique [num_unique] int64, places [n] int32
        """
        lengths, of_segments = (each.contiguous() for each in segments)
        seen = tokens.new_full((num_tokens * num_ranks,), -1)
        unique, places = tokens.new_empty(num_unique), tokens.new_empty(len(tokens), dtype=torch.int32)
        self._functions["send_once"](
            *(
                tokens.data_ptr(),
                lengths.data_ptr(),
                of_segments[0].data_ptr(),
                of_segments[1].data_ptr(),
                len(lengths),
            ),
            *(num_ranks, seen.data_ptr(), unique.data_ptr(), places.data_ptr()),
        )
        return unique, places

    def few_bytes(self) -> int:
        """Bytes of megamoe_few of routing.cpp."""
        return int(self._functions["few_bytes"]())

    def few_tokens(self, step: str, call: int) -> object:
        """A step of a call of few tokens, see execution/small_call.py: "bring", "route", "compute" or "reduce".

        call: address of megamoe_few of routing.cpp. "bring" returns whether ids and weights are right.
        """
        return self._functions[f"few_{step}"](call)

    def read(self, stack: Tensor) -> None:
        """Reads a tensor's memory on one core and does nothing else: what benchmarks hold products against."""
        assert stack.is_contiguous()
        self._functions["read"](stack.data_ptr(), stack.numel() * stack.element_size() // 8)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _bytes_of_one(stack: Tensor | None) -> int:
    return 0 if stack is None else stack.stride(0) * stack.element_size()


# ---- which library is used ----


class KernelWarning(UserWarning):
    """The CPU's kernels are not used, or not the best of them, and why."""


_asked: list[Path | None] = []


@contextmanager
def using(path: Path | None) -> Iterator[None]:
    """Within, chosen() is the library of that path, and none for None: for tests of each path."""
    _asked.append(path)
    try:
        yield
    finally:
        _asked.pop()


def chosen() -> Library | None:
    """The library of the best path that this CPU runs; None, with a warning, where none can be built."""
    if _asked:
        return None if _asked[-1] is None else load(_asked[-1])
    return _best()


@lru_cache(maxsize=1)
def _best() -> Library | None:
    return find(None)[0]


def find(note: Callable[[str], None] | None) -> tuple[Library | None, list[str]]:
    """The best library that can be built and passes its test, and why each better one is not used."""
    found: dict[str, list[str]] = {}
    library = None
    for path in worthwhile():
        try:
            library = load(path, note)
            break
        except BuildError as reason:
            found.setdefault(str(reason), []).append(path.name)
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in found.items()]
    if library is not None:
        return library, reasons
    warnings.warn(
        f"experts are computed by torch, slower: no kernels for this CPU ({'; '.join(reasons)})",
        KernelWarning,
        stacklevel=2,
    )
    return None, reasons


def prepare(note: Callable[[str], None]) -> None:
    """Builds the library that chosen() will use, where it is not built. note is told before a compilation begins."""
    paths = worthwhile()
    if paths and not is_built(paths[0]):
        find(note)


_loaded: dict[Path, Library] = {}


def load(path: Path, note: Callable[[str], None] | None = None) -> Library:
    """The library of a path once it has passed its test, built where it is not. BuildError says why there is none."""
    if path not in _loaded:
        if not path.runs_on(torch.cpu.get_capabilities()):
            raise BuildError(f"this process cannot run it: it needs {', '.join(path.needs)}")
        file = build(path, note)
        try:
            library = Library(path, str(file))
        except OSError as refusal:
            raise BuildError(f"{file} cannot be loaded: {refusal}; {ELSEWHERE}") from refusal
        fault = find_fault(library)
        if fault:
            raise BuildError(fault)
        _loaded[path] = library
    return _loaded[path]


# ---- the test of a library on this machine ----


def sum_in_order(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """The products' order of summation in plain torch: x [n, K], weight [N, K], scales [N, K/32] -> [n, N] float32.

    The oracle of the "fma" paths. A product of two BF16 values is exact in FP64, and FP64 has bits enough that adding
    FP32 to it and rounding to FP32 is the same as rounding once.
    """
    total = torch.zeros(len(x), len(weight), dtype=torch.float32, device="cpu")
    wide_x, wide_weight = x.to(torch.float64), weight.to(torch.float64)
    for start in range(0, x.shape[1], 32):
        part = torch.zeros_like(total)
        for k in range(start, min(start + 32, x.shape[1])):
            part = (wide_x[:, k, None] * wide_weight[:, k] + part.to(torch.float64)).to(torch.float32)
        scale = 1.0 if scales is None else scales[:, start // 32].to(torch.float64)
        total = (part.to(torch.float64) * scale + total.to(torch.float64)).to(torch.float32)
    return total


def sum_in_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """The order of summation of "bf16-tile" in plain torch: x [n, K] and weight [N, K] bfloat16 -> [n, N] float32.

    For each 32 of K a chain of fused steps over the even ones and one over the odd ones, from zero; their sum is added
    to the total. Subnormal operands and results are zero.
    """
    total = torch.zeros(len(x), len(weight), dtype=torch.float32, device="cpu")
    wide_x, wide_weight = (_without_subnormals(each.to(torch.float64)) for each in (x, weight))
    for start in range(0, x.shape[1], 32):
        even, odd = torch.zeros_like(total), torch.zeros_like(total)
        for k in range(start, min(start + 32, x.shape[1]), 2):
            even = _flushed(wide_x[:, k, None] * wide_weight[:, k] + even.to(torch.float64))
            if k + 1 < x.shape[1]:
                odd = _flushed(wide_x[:, k + 1, None] * wide_weight[:, k + 1] + odd.to(torch.float64))
        part = _flushed(even.to(torch.float64) + odd.to(torch.float64))
        total = _flushed(total.to(torch.float64) + part.to(torch.float64))
    return total


def _without_subnormals(values: Tensor) -> Tensor:
    return torch.where(values.abs() < 2.0**-126, values * 0, values)


def _flushed(exact: Tensor) -> Tensor:
    """float64 rounded to float32; zero of its sign where it is below 2^-126 once its mantissa is rounded."""
    small = (exact * 2.0**64).to(torch.float32).abs() < 2.0**-62
    return torch.where(small, exact * 0, exact).to(torch.float32)


def find_fault(library: Library) -> str:
    """What is wrong with the library on this machine, "" where nothing is: some milliseconds, at its first use.

    By the number of rows all ways of the products are taken. The bits of "fma" and of "bf16-tile" are known; those of
    "bf16-dot" must be the same in any company and near the sum in FP64.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    outputs, inputs, num_rows = 72, 96, 35
    weight, x = (
        torch.randn(rows, inputs, generator=generator, dtype=torch.float32, device="cpu")
        for rows in (outputs, num_rows)
    )
    x = x.to(torch.bfloat16)
    quantized, dense = quantize_mxfp4(weight), weight.to(torch.bfloat16)
    packed, scales = pack_mxfp4(quantized, library.path.order)
    exact = {"MXFP4": dequantize_mxfp4(quantized, torch.float64), "BF16": dense.to(torch.float64)}
    for name, held in (("MXFP4", (packed[None], scales[None])), ("BF16", pack_bf16(dense)[None])):
        whole = _product(library, x, held, outputs)
        for rows in (1, 3, 6, 20):
            if not torch.equal(_product(library, x[:rows], held, outputs), whole[:rows]):
                return f"products of {name} weights have other bits for {rows} rows than for {num_rows}"
        reference = x.to(torch.float64) @ exact[name].T
        if float((whole - reference).norm()) > 1e-5 * float(reference.norm()):
            return f"products of {name} weights are wrong"
    if library.path.arithmetic != "bf16-dot":
        if library.path.arithmetic == "fma":
            values = torch.tensor(_E2M1, dtype=torch.float32, device="cpu")[unpack_e2m1(quantized.packed).long()]
            expected = sum_in_order(x[:2], values, quantized.scales.view(torch.float8_e8m0fnu).to(torch.float32))
        else:
            expected = sum_in_tiles(x[:2], dequantize_mxfp4(quantized))
        if not torch.equal(_product(library, x[:2], (packed[None], scales[None]), outputs), expected):
            return "products of MXFP4 weights are not summed in the order that they should be"
    return ""


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _product(library: Library, x: Tensor, held: MXFP4Blocks | Tensor, outputs: int) -> Tensor:
    out = torch.empty(len(x), outputs, dtype=torch.float32, device="cpu")
    library.products(Rows(x, _count(x)), held, outputs, out)
    return out


def product_of(library: Library, x: Tensor, weight: MXFP4 | Tensor, out: Tensor) -> None:
    """x [n, K] bfloat16 times one matrix [N, K], MXFP4 or bfloat16 as it comes, into out [n, N]."""
    held: MXFP4Blocks | Tensor
    if isinstance(weight, MXFP4):
        packed, scales = pack_mxfp4(weight, library.path.order)
        held = (packed[None], scales[None])
    else:
        held = pack_bf16(weight)[None]
    library.products(Rows(x, _count(x)), held, out.shape[1], out)


def _count(x: Tensor) -> Tensor:
    return torch.tensor([len(x)], dtype=torch.int64, device="cpu")
