"""Tables of measured layers, products and exchanges as CSV files: what each row is of, and what was assumed of it.

Three kinds of rows, told apart by their columns (other columns are ignored):

    layer      hardware, model, hidden, intermediate, num_experts, topk, ep_size, tokens_per_rank, routing, latency_us;
               sizes that are missing are the catalog's, of a model that it has; routing is balanced where none is said;
               weight_format, dispatch_format and combine_format, or a `variant` that names them (nvfp4_bf16wire)
    products   op_name moe_generation or moe_context: grouped products of one rank (ai-dynamo/aiconfigurator)
    exchange   op_name ll, dispatch_avg_t_us and combine_avg_t_us: DeepEP's low-latency kernels; op_name normal,
               dispatch_transmit_us and combine_transmit_us: its normal ones, with 20 SMs (aiconfigurator); a line
               gives two rows

`stack` says what was timed, `profile` by whose constants it is planned where not by its device's own, `nodes` how many
hosts of equal size the ranks lie on; a `phase` (generation, context) tells a serving framework's table. A time ends its
name with its unit: latency_us, latency_ms, latency_s.

Commas, semicolons, tabs or | part the cells, as the line of names has them; names may be in capitals. Lines that are
empty or begin with # are passed over. A number has a decimal point and nothing between its thousands.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from megamoe.catalog import Hardware, Model, Profile, find_profile, load_hardware, load_model, names
from megamoe.paths import AnyPath, path_of
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.routing import Routing
from megamoe.planner.layer.stacks import check_kernel
from megamoe.schedule.formats import value_bytes

COLUMNS = ("hardware", "model", "ep_size", "tokens_per_rank", "latency_us")
SIZES = {"hidden": "expert_hidden", "intermediate": "intermediate", "num_experts": "num_experts", "topk": "topk"}
_OTHER_NAMES = {
    "hardware": ("device",),
    "hidden": ("hidden_size",),
    "intermediate": ("inter_size",),
    "topk": ("num_topk",),
    "ep_size": ("moe_ep_size",),
    "tokens_per_rank": ("num_token", "num_tokens"),
    "routing": ("distribution",),
    "nodes": ("node_num",),
    "profile": ("kernel_family",),
}
_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6}
STACKS = (
    *("fused", "kernel", "staged", "staged two-batch", "staged low latency", "staged normal", "megamoe"),
    *("masked", "contiguous", "dispatch", "combine", "normal dispatch", "normal combine"),
)
RANKS_OF_A_NODE = 8
NORMAL_SMS = 20  # of DeepEP's normal kernels, by default, and of those that the planner knows
SHARE_MAX = 1024  # of power_law_sampled, in aiconfigurator's collector after its runs on GB200
PRODUCT_DRAWS = 5  # of a power law, of which a row of aiconfigurator's products is the mean
_MOST = 10**12  # beyond it a size is a slip of the pen


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured time. stack: what was timed, of STACKS; nodes: hosts that the ranks lie on (None: not said).

    fused        the routed module: staging, kernel, routed scale      kernel       the fused kernel alone
    staged       DeepEP with grouped products, also two-batch, or by the one kind of kernels that is named
    megamoe      this package's own layer
    masked, contiguous    grouped products of one rank alone           dispatch, combine    DeepEP low latency alone
    normal dispatch, normal combine    DeepEP's normal kernels alone
    Of products alone, tokens_per_rank is a mean and may be a fraction. drawn: the routing as the planner knows it;
    draws: of how many draws it is the mean, 0 for as many as that kind of routing has.
    profile: None for the device's own.
    line: of the file that it is from, 0 where it is from none.
    """

    hardware: str
    model: str
    expert: Expert
    ep_size: int
    tokens_per_rank: float
    routing: str
    latency_us: float
    stack: str = "fused"
    nodes: int | None = None
    drawn: str | None = None
    profile: str | None = None
    line: int = 0
    draws: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a file, and in words what was assumed where the file does not say."""

    rows: list[Measured]
    assumed: tuple[str, ...] = ()


@dataclass(slots=True)
class _Reader:
    """One file's columns, read by their own or by another name, and what had to be assumed."""

    columns: list[str]
    assumed: dict[str, None] = field(default_factory=dict)

    def has(self, key: str) -> bool:
        return any(name in self.columns for name in (key, *_OTHER_NAMES.get(key, ())))

    def text(self, row: dict[str, str], key: str) -> str:
        found = (row[name] for name in (key, *_OTHER_NAMES.get(key, ())) if name in row)
        return next(found, "").strip()

    def whole(self, row: dict[str, str], key: str) -> int:
        text = self.text(row, key)
        value = _number(text)
        if not (0 < value <= _MOST and value == int(value)):
            raise ValueError(f"{key} {_quoted(text)} is no positive whole number{_separated(text)}")
        return int(value)

    def assume(self, said: str) -> None:
        self.assumed[said] = None

    def time_us(self, row: dict[str, str], key: str) -> float:
        """`key` with the unit that ends its name, in microseconds."""
        name = next((f"{key}_{unit}" for unit in _UNITS if f"{key}_{unit}" in row), key)
        if name == key:
            self.assume(f"{key} in ms, as the tables of aiconfigurator have it: its name has no unit")
        value = _number(row[name]) * _UNITS[name.rsplit("_", 1)[1] if name != key else "ms"]
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} {_quoted(row[name])} is no positive number{_separated(row[name])}")
        return value


Reads = Callable[[_Reader, dict[str, str]], Iterator[Measured]]


def read(path: AnyPath) -> Table:
    """The rows of a CSV file; ValueError names the file, the line and what is wrong with it."""
    path = path_of(path)
    if path.is_dir() or not path.exists():  # what comes through a pipe is read as well
        raise ValueError(f"{path} is a folder" if path.is_dir() else f"there is no file {path}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = _rows(path, file)
        _, cells = next(lines, (0, []))
        names = [cell.lower() for cell in cells]
        reader = _Reader([name for name in names if name])
        kind = _kind(path, reader)
        twice = [name for name, times in Counter(reader.columns).items() if times > 1]
        if twice:
            raise ValueError(f"{path} has more than one column {', '.join(twice)}")
        rows: list[Measured] = []
        for number, cells in lines:
            try:
                if any(cells[len(names) :]):
                    raise ValueError(f"{len(cells)} cells in {len(names)} columns{_separated(','.join(cells))}")
                cells += [""] * (len(names) - len(cells))
                rows += [replace(each, line=number) for each in kind(reader, dict(zip(names, cells, strict=False)))]
            except ValueError as wrong:
                raise ValueError(f"{path}, line {number}: {wrong}") from wrong
    if not rows:
        raise ValueError(f"{path} has no rows")
    return Table(rows, tuple(reader.assumed))


def _rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line that has any; the first has the columns' names, and what stands between them."""
    number, between = 0, ","

    def written() -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(file, start=1):  # noqa: B007  read below
            if line.strip() and not line.lstrip().startswith("#"):
                yield line

    lines = written()
    first = next(lines, "")
    between = max(",;\t|", key=first.count)
    try:
        for cells in csv.reader(itertools.chain([first], lines), delimiter=between, skipinitialspace=between != "\t"):
            if any(cell.strip() for cell in cells):
                yield number, [cell.strip() for cell in cells]
    except csv.Error as wrong:
        raise ValueError(f"{path}, line {number}: {wrong}") from wrong


def read_table(path: AnyPath) -> list[Measured]:
    """The rows of a CSV file, as `read` has them."""
    return read(path).rows


def _kind(path: Path, reader: _Reader) -> Reads:
    """What the columns are those of. ValueError names the columns that a table of layers would lack."""
    columns = reader.columns
    if "dispatch_avg_t_us" in columns and "combine_avg_t_us" in columns:
        return _low_latency
    if "dispatch_transmit_us" in columns and "combine_transmit_us" in columns:
        return _normal
    if "op_name" in columns and reader.has("intermediate") and "moe_ep_size" in columns:
        return _products
    timed = any(f"latency_{unit}" in columns for unit in _UNITS)
    missing = [key for key in COLUMNS if not reader.has(key) and not (key == "latency_us" and timed)]
    if missing:
        needed = f"{', '.join(COLUMNS)}, and {', '.join(SIZES)} of models that the catalog has not"
        raise ValueError(f"{path} has no column {', '.join(missing)}; it needs {needed}")
    return _layer


# ---- numbers ----


def _number(text: str) -> float:
    """As written, also a whole number with .0; 0 where it is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _separated(text: str) -> str:
    """What may be wrong with numbers that have a comma in them."""
    return ": write numbers with a decimal point, and nothing between thousands" if "," in text else ""


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


# ---- layers ----


def _layer(reader: _Reader, row: dict[str, str]) -> Iterator[Measured]:
    name, hardware = reader.text(row, "model"), _hardware(reader.text(row, "hardware"))
    model = _known_model(name)
    formats = _formats(reader, row, model)
    hidden, width, experts, topk = (_size(reader, row, key, model) for key in SIZES)
    gated, situ = (model.gated, model.situ) if model else (True, False)
    weights, there, back = formats
    expert = Expert(hidden, width, experts, topk, gated, weights, there, back, situ)
    stack = _stack(reader, row)
    routing, drawn = reader.text(row, "routing"), None
    if not routing:
        reader.assume("balanced routing, where none is said")
        routing = "balanced"
    if stack == "kernel" and routing == "balanced":
        # the benchmarks of DeepGEMM and FlashInfer draw each token's experts; SGLang's deals them out
        reader.assume("balanced routing of a kernel alone: every expert as likely, drawn by chance (uniform)")
        drawn = "uniform"
    if hardware != "gb200" and Routing.parse(routing).kind == "power_law_sampled" and not Routing.parse(routing).most:
        # power_law_sampled of the runs on GB200 was drawn by an earlier state of its collector than everyone else's
        reader.assume(f"shares of power_law_sampled up to {SHARE_MAX}, as the collector that gave it its name has them")
        drawn = f"{routing}_{SHARE_MAX}"
    profile = _profile(reader, row, hardware, stack, expert)
    yield Measured(
        hardware,
        name,
        expert,
        reader.whole(row, "ep_size"),
        reader.whole(row, "tokens_per_rank"),
        routing,
        reader.time_us(row, "latency"),
        stack,
        reader.whole(row, "nodes") if reader.text(row, "nodes") else None,
        drawn,
        profile,
    )


def _size(reader: _Reader, row: dict[str, str], key: str, model: Model | None) -> int:
    """A size of the layer: the row's, or the catalog's. ValueError where neither has it."""
    if reader.text(row, key):
        return reader.whole(row, key)
    if model is None:
        name = reader.text(row, "model")
        raise ValueError(f"no {key}, and the catalog has no model {_quoted(name)} that would say it")
    reader.assume("sizes that the file does not say: those of the catalog's model of that name")
    return int(getattr(model, SIZES[key]))


def _profile(reader: _Reader, row: dict[str, str], hardware: str, stack: str, expert: Expert) -> str | None:
    """The profile that a row names. ValueError where there is none, or its kernel is none for the row."""
    name = reader.text(row, "profile")
    if not name:
        return None
    reader.assume(words_of(checked_profile(name, hardware, stack, expert)))
    return name


@lru_cache(maxsize=64)
def checked_profile(name: str, hardware: str, stack: str, expert: Expert) -> Profile:
    """A profile for what was timed. ValueError where there is none of that name, or where it is of another kernel."""
    found = find_profile(hardware_of(hardware), name)
    check_kernel(found, "fused" if stack == "kernel" else stack, expert.weight_format, expert.dispatch_format)
    return found


def words_of(profile: Profile) -> str:
    """What is assumed where this profile is named."""
    return f"profile {profile.name}: {profile.title}; fitted: {profile.fitted}"


def by_profile(table: Table, name: str) -> Table:
    """The table with every row that names no profile planned by this one. ValueError names the row it is none for."""
    rows, said = [], dict.fromkeys(table.assumed)
    for number, row in enumerate(table.rows, start=1):
        if row.profile is None:
            try:
                said[words_of(checked_profile(name, row.hardware, row.stack, row.expert))] = None
            except ValueError as wrong:
                raise ValueError(f"row {number}: {wrong}") from wrong
            row = replace(row, profile=name)
        rows.append(row)
    return Table(rows, tuple(said))


_SPELLED = (  # what a stack's name holds -> the stack; the first that fits
    (r"two.?batch|\btbo\b", "staged two-batch"),
    (r"low.?latency|\bll\b", "staged low latency"),
    (r"normal|high.?throughput|\bht\b", "staged normal"),
    (r"staged|deepep|unfused", "staged"),
    (r"^megamoe$", "megamoe"),
    (r"kernel", "kernel"),
    (r"fused|mega.?moe|deepgemm", "fused"),
)


def _stack(reader: _Reader, row: dict[str, str]) -> str:
    """What was timed: as the file says, else a module where a serving framework's phase is named, else the kernel."""
    said, phase = reader.text(row, "stack").lower(), reader.text(row, "phase").lower()
    if said:
        stack = next((stack for pattern, stack in _SPELLED if re.search(pattern, said.replace("_", " "))), None)
        if stack is None:
            raise ValueError(f"stack {said!r} is not known; there are {', '.join(STACKS[:7])}")
        return stack
    if phase and not reader.text(row, "variant"):
        reader.assume("no stack is named, a phase is: the fused module (staging, kernel, routed scale) in a graph")
        return "fused"
    reader.assume("no stack is named: the fused kernel alone, without staging and graph")
    return "kernel"


def _formats(reader: _Reader, row: dict[str, str], model: Model | None) -> list[str]:
    """By column, by variant, by the catalog's model; mxfp4 weights, mxfp8 there and bf16 back where none says it."""
    variant = _variant(reader.text(row, "variant").lower())
    known = {"weight_format": model.weight_format} if model else {}
    fallback = {"weight_format": "mxfp4", "dispatch_format": "mxfp8", "combine_format": "bf16"}
    found = []
    for key, assumed in fallback.items():
        value = reader.text(row, key) or variant.get(key) or known.get(key)
        if value is None:
            value = assumed
            reader.assume(f"{key} {assumed}: neither a column nor a variant says it")
        value_bytes(value)
        found.append(value)
    return found


_OPERANDS = (  # what a variant's name starts with -> weights, tokens
    (r"fp8xfp4", "mxfp4", "mxfp8"),
    (r"nvfp4", "nvfp4", "nvfp4"),
    (r"mxfp4", "mxfp4", "mxfp4"),
    (r"mxfp8|fp8", "fp8", "mxfp8"),
    (r"bf16", "bf16", "bf16"),
)


def _variant(text: str) -> dict[str, str]:
    """nvfp4_combine_mxfp8 -> nvfp4 weights and tokens, mxfp8 back      dg_fp8xfp4 -> mxfp4 weights, mxfp8 tokens"""
    back = re.search(r"combine_([a-z0-9]+)|([a-z0-9]+?)_?wire", text)
    formats = {"combine_format": back[1] or back[2]} if back else {}
    operands = re.sub(r"_?(combine_[a-z0-9]+|[a-z0-9]+?_?wire)", "", text)
    for pattern, weights, tokens in _OPERANDS:
        if re.search(pattern, operands):
            return {**formats, "weight_format": weights, "dispatch_format": tokens}
    return formats


# ---- parts of the staged stack ----


def _products(reader: _Reader, row: dict[str, str]) -> Iterator[Measured]:
    """aiconfigurator's table of a rank's experts: num_tokens are those of all ranks."""
    op = reader.text(row, "op_name")
    if op not in ("moe_generation", "moe_context"):
        raise ValueError(
            f"op_name {op!r} is of products that the planner has not; there is moe_generation and moe_context, masked "
            "and contiguous grouped products of DeepGEMM"
        )
    decode = op == "moe_generation"
    ep, tokens = reader.whole(row, "ep_size"), reader.whole(row, "tokens_per_rank")
    split = reader.whole(row, "moe_tp_size") if reader.text(row, "moe_tp_size") else 1
    width = reader.whole(row, "intermediate") // split
    dtype = row.get("moe_dtype", "").lower()
    weights = next((fmt for fmt in ("nvfp4", "mxfp4", "bf16", "int8") if fmt in dtype), "fp8")
    weights = "bf16" if dtype in ("float16", "bfloat16") else weights
    expert = Expert(
        reader.whole(row, "hidden"), width, reader.whole(row, "num_experts"), reader.whole(row, "topk"),
        weight_format=weights, dispatch_format="bf16" if weights == "bf16" else "mxfp8",
    )  # fmt: skip
    reader.assume("num_tokens of products are those of all ranks; the rank is the one with most rows")
    routing, drawn = reader.text(row, "routing"), None
    if routing in ("uniform", "balanced"):
        drawn = "balanced"
        reader.assume("uniform products: every expert the same; in context whole blocks of 128 rows, of as few experts")
    yield Measured(
        _hardware(reader.text(row, "hardware")),
        f"{expert.num_experts} x {expert.hidden} x {width}",
        expert,
        ep,
        tokens / ep,
        routing,
        reader.time_us(row, "latency"),
        "masked" if decode else "contiguous",
        drawn=drawn,
        draws=PRODUCT_DRAWS if routing.startswith("power_law") else 0,
    )


def _low_latency(reader: _Reader, row: dict[str, str]) -> Iterator[Measured]:
    """aiconfigurator's table of DeepEP's low-latency kernels; the time of an expert is left out."""
    op = row.get("op_name", "ll").lower()
    if op not in ("ll", "low_latency"):
        raise ValueError(f"op_name {op!r} is not known; there is ll, DeepEP's low-latency kernels")
    return _exchange(reader, row, {"dispatch": "dispatch_avg_t", "combine": "combine_avg_t"})


def _normal(reader: _Reader, row: dict[str, str]) -> Iterator[Measured]:
    """aiconfigurator's table of DeepEP's normal kernels; the notification before a dispatch is left out."""
    op = row.get("op_name", "normal").lower()
    if op != "normal":
        raise ValueError(f"op_name {op!r} is not known; there is normal, DeepEP's normal kernels")
    for key in ("dispatch_sms", "combine_sms"):
        if not reader.text(row, key):
            reader.assume(f"{NORMAL_SMS} SMs, where none are said")
        elif reader.whole(row, key) != NORMAL_SMS:
            raise ValueError(f"{key} {row[key]}: the planner knows DeepEP's normal kernels with {NORMAL_SMS} SMs alone")
    reader.assume(
        "of normal kernels what tokens take: a call, and the counts before it, hide behind the host's launches"
    )
    return _exchange(reader, row, {"normal dispatch": "dispatch_transmit", "normal combine": "combine_transmit"})


def _exchange(reader: _Reader, row: dict[str, str], ways: dict[str, str]) -> Iterator[Measured]:
    """Both ways of a line of DeepEP, stack -> column: tokens of a rank, eight ranks a node."""
    nodes = reader.whole(row, "nodes") if reader.has("nodes") else 1
    reader.assume(f"{RANKS_OF_A_NODE} ranks a node, FP8 there and BF16 back, evenly spread tokens")
    expert = Expert(
        reader.whole(row, "hidden"), 1, reader.whole(row, "num_experts"), reader.whole(row, "topk"), weight_format="fp8"
    )
    hardware = _hardware(reader.text(row, "hardware"))
    for stack, key in ways.items():
        yield Measured(
            hardware, f"{expert.num_experts} x {expert.hidden}", expert, RANKS_OF_A_NODE * nodes,
            reader.whole(row, "tokens_per_rank"), "balanced", reader.time_us(row, key), stack, nodes,
        )  # fmt: skip


# ---- names ----


@lru_cache(maxsize=64)
def _known_model(name: str) -> Model | None:
    name = name.lower().replace("_", "-")
    return load_model(name) if name in names("models") else None


@lru_cache(maxsize=64)
def _hardware(name: str) -> str:
    """The catalog's name of a device: "NVIDIA H100 80GB HBM3" -> h100. ValueError names the nearest."""
    words = [
        word for word in re.split(r"[\s_,()]+", name.lower()) if word not in ("nvidia", "amd", "huawei", "instinct")
    ]
    known = set(names("hardware"))
    for number in range(len(words), 0, -1):
        if "-".join(words[:number]) in known:
            return "-".join(words[:number])
    return load_hardware(name).name


@lru_cache(maxsize=64)
def hardware_of(name: str) -> Hardware:
    return load_hardware(name)
