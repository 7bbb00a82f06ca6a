"""Dense products of a model on the package's own kernels: a row's bits depend on neither its company nor its place.

An FP32 (or FP16) operand is a sum of BF16 pieces, exact to FP32's last bits, so that one product of BF16 pieces, in the
order of the experts' products, is the FP32 product.
"""

# n rows   N outputs   K inputs   P pieces

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megamoe.ambient import eager, undisturbed
from megamoe.execution.products import Known, multiply_in_blocks
from megamoe.formats.blocks import spread_blocks
from megamoe.formats.mxfp8 import e4m3_to_bf16
from megamoe.kernels.cpu.layout import OUTPUTS, bf16_shape, pack_bf16, unpack_bf16
from megamoe.kernels.cpu.library import Rows, chosen, product_of
from megamoe.parallel.private import in_functional_transform

_MOST_PIECES = 3  # of 8 bits each, of the 24 that FP32 has
_ROWS_AT_ONCE = 1024  # outputs of FP8 that are decoded together
_VECTORS = 64  # values: a multiple of what vector code takes in one step, on any CPU
_VALUES_AT_ONCE = 32_768  # torch gives no part of so few to another thread


def pieces_of(values: Tensor, most: int = _MOST_PIECES) -> list[Tensor]:
    """values as a sum of at most `most` bfloat16 tensors, each what the ones before leave, rounded."""
    if values.dtype == torch.bfloat16:
        return [values]
    pieces, rest = [values.to(torch.bfloat16)], values.to(torch.float32)
    while len(pieces) < most:
        rest = rest - pieces[-1].to(torch.float32)
        if not bool(rest.count_nonzero()):
            break
        pieces.append(rest.to(torch.bfloat16))
    return pieces


def _pairs(of_x: int, of_weight: int) -> list[tuple[int, int]]:
    """Which pieces are multiplied, the smallest products first; what FP32 would not hold is left out."""
    pairs = [(i, j) for i in range(of_x) for j in range(of_weight) if i + j < _MOST_PIECES]
    return sorted(pairs, key=lambda pair: (-sum(pair), pair))


class DenseWeight:
    """A matrix [N, K], BF16, FP16 or FP32, as the device's products read it; filled row by row.

    Held once in BF16 pieces where it is not BF16: as many as its values need, up to three.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        (outputs, inputs), self.dtype = shape, dtype
        self.shape = (outputs, inputs)
        self._library = chosen()
        self._pieces: list[Tensor] = []

    @classmethod
    def of(cls, weight: Tensor) -> DenseWeight:
        made = cls(tuple(weight.shape), weight.dtype)
        made.put(0, weight)
        return made

    def put(self, first: int, rows: Tensor) -> None:
        """Takes rows [first, first + n) of the matrix; first is a multiple of 32, and n but for the last."""
        assert first % OUTPUTS == 0, first
        for number, piece in enumerate(pieces_of(rows.detach().to(self.dtype))):
            if number == len(self._pieces):
                self._pieces.append(self._empty())
            held = self._pieces[number]
            if self._library is None:
                held[first : first + len(rows)] = piece
            else:
                begin = first // OUTPUTS
                pack_bf16(piece, held[begin : begin + -(-len(rows) // OUTPUTS)])

    def _empty(self) -> Tensor:
        size = self.shape if self._library is None else bf16_shape(*self.shape)
        # later pieces are zero where rows do not need them
        make = torch.zeros if self._pieces else torch.empty
        return make(size, dtype=torch.bfloat16, device="cpu")

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self._pieces)

    def plain(self) -> Tensor:
        """[N, K] of the dtype that it came in."""
        wide = [piece if self._library is None else unpack_bf16(piece, *self.shape) for piece in self._pieces]
        if len(wide) == 1:
            return wide[0].to(self.dtype)
        return sum((piece.to(torch.float32) for piece in reversed(wide)), torch.zeros(())).to(self.dtype)

    def multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [n, K] -> [n, N] of dtype: FP32 sums in an order that depends on K alone."""
        pieces = pieces_of(x)
        pairs = _pairs(len(pieces), len(self._pieces))
        kind = dtype if dtype == torch.bfloat16 and len(pairs) == 1 else torch.float32
        total: Tensor | None = None
        for i, j in pairs:
            product = self._product(pieces[i].contiguous(), self._pieces[j], kind)
            total = product if total is None else total.add_(product)
        assert total is not None
        return total.to(dtype)

    @property
    def is_plain(self) -> bool:
        """Whether rows in BF16 take one product to a result in BF16."""
        return self._library is not None and len(self._pieces) == 1

    def multiply_plainly(self, x: Tensor) -> Tensor:
        """multiply() of x [n, K] bfloat16 to bfloat16, where is_plain."""
        return self._product(x.contiguous(), self._pieces[0], torch.bfloat16)

    def _product(self, x: Tensor, held: Tensor, kind: torch.dtype) -> Tensor:
        if self._library is None:
            return multiply_in_blocks(x, held, kind)
        out = torch.empty(len(x), self.shape[0], dtype=kind, device="cpu")
        self._library.products(Rows(x, _count(len(x))), held.unsqueeze(0), self.shape[0], out)
        return out


@lru_cache(maxsize=64)
def _count(rows: int) -> Tensor:
    """[1] int64, to be read only."""
    return torch.tensor([rows], dtype=torch.int64, device="cpu")


class DenseLinear(nn.Module):
    """nn.Linear whose products have the same bits in any batch: x [..., K] -> [..., N] in the dtype of x.

    The weight is no parameter: it lies as the kernels read it. `weight` gives it back, unpacked anew at each access.
    torch refuses to change that in place, which no product would show.
    """

    def __init__(self, held: DenseWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.held = held
        self.out_features, self.in_features = held.shape
        self.register_buffer("bias", bias, persistent=False)

    @property
    def weight(self) -> Tensor:
        with torch.inference_mode():
            return self.held.plain()

    def forward(self, x: Tensor) -> Tensor:
        with undisturbed(torch.device("cpu")):
            bias = self._buffers["bias"]
            if bias is None and x.dtype == torch.bfloat16 and self.held.is_plain:
                return self.held.multiply_plainly(x.reshape(-1, self.in_features)).view(
                    *x.shape[:-1], self.out_features
                )
            return _linear(x, self.held.multiply, self.out_features, bias)

    def extra_repr(self) -> str:
        has_bias = self._buffers["bias"] is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}"


class FP8Linear(nn.Module):
    """nn.Linear that holds its weight in FP8, E4M3 with a scale per b x b, and multiplies it exactly, in FP32.

    values [N, K] float8_e4m3fn, scales [ceil(N/b), ceil(K/b)] float32. A product is summed over b inputs at a time, as
    the experts' are, and the sums are scaled and added in ascending order: bits depend on K alone. Scales that are
    powers of two go into the weights, which BF16 holds exactly then. Rows of the weight are decoded as they are needed.
    """

    def __init__(self, values: Tensor, scales: Tensor, block: tuple[int, int], bias: Tensor | None = None) -> None:
        super().__init__()
        self.block = block
        self.out_features, self.in_features = values.shape
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scales", scales.to(torch.float32), persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        mantissa, _ = torch.frexp(scales.to(torch.float32))
        self.exact = bool((mantissa == 0.5).all())

    @property
    def weight(self) -> Tensor:
        """[N, K] bfloat16 where that is exact, else float32."""
        values, scales = self.get_buffer("values"), self.get_buffer("scales")
        with torch.inference_mode():  # in which it is made, so that torch refuses to change it in place
            spread = spread_blocks(scales, self.block, self.out_features, self.in_features)
            return (values.to(torch.float32) * spread).to(torch.bfloat16 if self.exact else torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        bias = self._buffers["bias"]
        with undisturbed(torch.device("cpu")):
            return _linear(x, self._multiply, self.out_features, bias)

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        total = torch.zeros(len(x), self.out_features, dtype=torch.float32, device="cpu")
        pieces = pieces_of(x)
        step = -(-_ROWS_AT_ONCE // self.block[0]) * self.block[0]
        for first in range(0, self.out_features, step):
            out = total[:, first : first + step]
            for weight, scale, columns in self._decoded(first, step):
                for piece in reversed(pieces):
                    product = _product(piece[:, columns].contiguous(), weight)
                    out.add_(product if scale is None else product.mul_(scale))
        return total.to(dtype)

    def _decoded(self, first: int, step: int) -> Iterator[tuple[Tensor, Tensor | None, slice]]:
        """Matrices in BF16 for some outputs, the scales of their products, and of which inputs they are."""
        values = self.get_buffer("values")[first : first + step]
        tall, wide = self.block
        scales = self.get_buffer("scales")[first // tall : -(-(first + step) // tall)]
        decoded = e4m3_to_bf16(values) if values.shape[1] % 2 == 0 else values.to(torch.bfloat16)
        if self.exact:
            yield decoded.mul_(spread_blocks(scales.to(torch.bfloat16), self.block, *values.shape)), None, slice(None)
            return
        of_rows = scales.repeat_interleave(tall, 0)[: len(values)]
        for number in range(scales.shape[1]):
            columns = slice(number * wide, (number + 1) * wide)
            yield decoded[:, columns].contiguous(), of_rows[:, number], columns

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}"


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, K] by weight [N, K], both bfloat16 -> [n, N] float32"""
    library = chosen()
    if library is None:
        return multiply_in_blocks(x, weight, torch.float32)
    out = torch.empty(len(x), len(weight), dtype=torch.float32, device="cpu")
    product_of(library, x, weight, out)
    return out


def _linear(x: Tensor, multiply: Callable[[Tensor, torch.dtype], Tensor], outputs: int, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N] in the dtype of x, the bias added before the one rounding."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if bias is None:
        out = multiply(rows, x.dtype)
    else:
        out = multiply(rows, torch.float32).add_(bias.to(torch.float32)).to(x.dtype)
    return out.view(*x.shape[:-1], outputs)


# ---- what a model does outside of its linear modules ----


# by torch's names of their operands: input, and other or mat2
_PRODUCTS = {torch.matmul, torch.mm, torch.bmm}
_PRODUCTS |= {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm}
_CASTS = {torch.Tensor.float, torch.Tensor.to, torch.Tensor.type, torch.Tensor.bfloat16}


class FixedOrder(TorchFunctionMode):
    """Within, products with a model's weights, and functions of one value, do not depend on how many rows there are.

    What routers do in place of a linear module: F.linear, matmul, mm and bmm with a parameter, also one that is cast
    first, go to DenseWeight; it is packed at the first call. Functions of one value read a table of all BF16 values, or
    take FP32 in whole vectors: vector code and the code at an array's end round differently.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights: dict[int, Tensor] = {_memory(each): each for each in model.parameters()}
        self._matrices = [each for each in model.parameters() if each.dim() > 1]
        self._casts: dict[tuple[Any, ...], tuple[Known, Tensor]] = {}
        self._packed: dict[tuple[Any, ...], tuple[Known, DenseWeight]] = {}
        self._tables: dict[Any, Tensor] = {}

    def __enter__(self) -> FixedOrder:
        """Looks where weights are that have been given other memory since."""
        for weight in self._matrices:
            memory = _memory(weight)
            there = self._weights.get(memory)
            if there is None or _memory(there) != memory:
                for former in [place for place, each in self._weights.items() if each is weight]:
                    self._forget(former)
                self._weights[memory] = weight
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _CHANGED or in_functional_transform():  # masks are made by vmap, and have no storage
            return func(*args, **kwargs)
        if func is nn.functional.linear:
            return self._linear(*args, **kwargs)
        if func in _PRODUCTS:
            x, weight = _operands(args, kwargs)
            if weight is not None and self._known(weight) and weight.dim() in (2, 3):
                return self._linear(x, weight.t()) if weight.dim() == 2 else self._bmm(x, weight)
        if func in _CASTS and args and self._known(args[0]) and args[0].dim() >= 2:
            return self._cast(func, args, kwargs)
        if func in _UNARY and len(args) == 1 and args[0].device.type == "cpu" and not kwargs.get("inplace", False):
            return self._unary(func, args[0], {key: each for key, each in kwargs.items() if key != "inplace"})
        return func(*args, **kwargs)

    def _known(self, tensor: Tensor) -> bool:
        """Whether it is a weight, or a part of one: a cast of the model leaves the memory of weights to others."""
        if tensor.device.type != "cpu":
            return False
        memory = _memory(tensor)
        weight = self._weights.get(memory)
        return weight is not None and _memory(weight) == memory

    def _cast(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A cast of a weight is made once, and kept until the weight changes."""
        weight, key = args[0], (*_place(args[0]), func, *args[1:], *kwargs.items())
        known, made = self._casts.get(key, (None, weight))
        if known is None or not known.still(weight):
            if _memory(made) != _memory(weight):
                self._forget(_memory(made))
            made = func(*args, **kwargs)
            self._casts[key] = Known(weight), made
            if not self._known(made):
                self._weights[_memory(made)] = made
        return made

    def _forget(self, memory: int) -> None:
        """Drops what a weight was, or a cast of that, and what was packed of it."""
        self._weights.pop(memory, None)
        self._packed = {key: each for key, each in self._packed.items() if key[0] != memory}

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """torch's names, since a model may give them."""
        if input.device.type != "cpu" or weight.dim() != 2 or not input.is_floating_point():
            return nn.functional.linear(input, weight, bias)
        with undisturbed(torch.device("cpu")):
            return _linear(input, self._held(weight).multiply, len(weight), bias)

    def _bmm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., G, n, K], [..., 1, n, K] or [n, K] by weight [G, K, N] -> [..., G, n, N]"""
        of_each = x if x.dim() > 2 else x[None]
        rows = of_each.expand(*of_each.shape[:-3], len(weight), *of_each.shape[-2:])
        return torch.stack([self._linear(each, w.t()) for each, w in zip(rows.unbind(-3), weight, strict=True)], -3)

    def _held(self, weight: Tensor) -> DenseWeight:
        if not self._known(weight):
            return DenseWeight.of(weight)
        key = _place(weight)
        known, packed = self._packed.get(key, (None, None))
        if packed is None or known is None or not known.still(weight):
            known, packed = self._packed[key] = Known(weight), DenseWeight.of(weight)
        return packed

    def _unary(self, func: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        with undisturbed(torch.device("cpu")):
            if x.dtype == torch.bfloat16:
                key = (func, *kwargs.items())
                if key not in self._tables:
                    self._tables[key] = _table(func, kwargs)
                index = x.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
                return self._tables[key].index_select(0, index.flatten()).view(x.shape)
            if x.dtype == torch.float32 and x.numel():
                return _in_tiles(func, x, kwargs)
            return func(x, **kwargs)  # type: ignore[no-any-return]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _place(weight: Tensor) -> tuple[Any, ...]:
    """What tells a weight, or a part of one, from others: first its memory."""
    return _memory(weight), weight.data_ptr(), weight.dtype, *weight.shape, *weight.stride()


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Both operands of a product, None for what is not given by a name that is known."""
    given = {("other" if name == "mat2" else name): value for name, value in kwargs.items()}
    given |= dict(zip(("input", "other"), args, strict=False))
    return (given.get("input"), given.get("other")) if set(given) == {"input", "other"} else (None, None)


_UNARY = {
    *(nn.functional.silu, nn.functional.softplus, nn.functional.sigmoid, nn.functional.gelu, nn.functional.tanh),
    *(torch.sigmoid, torch.exp, torch.tanh, torch.cos, torch.sin),
    *(torch.Tensor.sigmoid, torch.Tensor.exp, torch.Tensor.tanh, torch.Tensor.cos, torch.Tensor.sin),
}
_CHANGED = {nn.functional.linear, *_PRODUCTS, *_CASTS, *_UNARY}


def _table(func: Any, kwargs: dict[str, Any]) -> Tensor:
    """[65536] bfloat16: func of every BF16 value, evaluated in FP64 and rounded once."""
    values = torch.arange(65536, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.bfloat16)
    return func(values.to(torch.float64), **kwargs).to(torch.bfloat16)  # type: ignore[no-any-return]


def _in_tiles(func: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """func of x float32, so many values at a time that one thread takes them, filled up to whole vectors."""
    flat = x.contiguous().view(-1)
    whole = torch.nn.functional.pad(flat, (0, -len(flat) % _VECTORS))
    parts = [func(part, **kwargs) for part in torch.split(whole, _VALUES_AT_ONCE)]
    return torch.cat(parts)[: len(flat)].view(x.shape)


def compute_in_fixed_order(model: nn.Module) -> None:
    """From now on the model's forward runs as FixedOrder says."""
    order, forward, alive = FixedOrder(model), type(model).forward, weakref.ref(model)

    @wraps(model.forward)
    @eager
    def ordered(*args: Any, **kwargs: Any) -> Any:
        with order:
            return forward(alive(), *args, **kwargs)  # a model that held itself would outlive its last user

    model.forward = ordered
