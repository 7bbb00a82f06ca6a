"""Every term of a layer's time, in the order in which they add up; numbers are arithmetic that can be done again."""

# T tokens of a rank   h hidden   d intermediate   n rows of an expert   P ranks (EP)

from __future__ import annotations

from dataclasses import replace
from math import ceil

from megamoe.planner.layer.cost import row_us
from megamoe.planner.layer.device import Device
from megamoe.planner.layer.plan import Plan
from megamoe.planner.layer.stacks import launched, sent_once
from megamoe.planner.layer.tiles import COLUMNS, SITU_EPILOGUE, expert_tile_us, reached_tflops, tiling_of
from megamoe.planner.serving.flops import Term
from megamoe.schedule.formats import value_bytes


def g(value: float) -> str:
    """Seven digits, as one would type them: 1234567.8 -> 1234568    0.1 -> 0.1"""
    text = f"{value:.7g}"
    return f"{value:.0f}" if "e+" in text and value < 1e16 else text


def layer_terms(planned: Plan) -> list[Term]:
    """In the order in which they add up to layer_us. With skewed routing, times of single experts are means."""
    layer = planned.layer
    terms = _row_terms(planned)
    if planned.request.stack == "staged":
        return [*terms, *_staged_terms(planned)]
    if layer.experts_touched:
        terms += [*_work_terms(planned), *_link_terms(planned), *_wave_terms(planned)]
    terms += _fixed_terms(planned)
    parts = f"{g(layer.fixed_us)} + {g(layer.core_us)} + {g(layer.sum_us)}"
    return [*terms, Term("layer", "fixed + waves + slot sum", parts, layer.layer_us, "us")]


def _row_terms(planned: Plan) -> list[Term]:
    request, layer, expert = planned.request, planned.layer, planned.request.expert
    if request.routing == "balanced":
        numbers = f"{request.tokens_per_rank} x {expert.topk}"
        if abs(layer.rows - request.tokens_per_rank * expert.topk) > 1e-6 * layer.rows:
            numbers = f"{g(layer.experts_touched)} x {g(layer.rows / layer.experts_touched)}"
        formula = "T k" if " x " + str(expert.topk) in numbers else "experts that have rows x rows of each"
    else:
        formula, numbers = f"busiest of {request.ep} ranks, {request.routing}", g(layer.rows)
    rows = Term("rows of the busiest rank", formula, numbers, layer.rows, "rows")
    slots = request.model.num_experts + request.redundant
    local = -(-slots // request.ep)
    touched = f"experts of a rank that have rows, of ceil({slots} / {request.ep}) = {local}"
    return [rows, Term("experts whose weights are read", touched, g(layer.experts_touched), layer.experts_touched, "")]


def _work_terms(planned: Plan) -> list[Term]:
    layer, expert, device = planned.layer, planned.request.expert, _device(planned)
    read = f"({g(layer.experts_touched)} x {g(expert.weight_bytes)} + {g(layer.rows)} x {g(expert.row_bytes)})"
    power = g(device.memory_overlap)
    alone = f"({g(layer.compute_us)}^{power} + {g(layer.memory_us)}^{power})^(1 / {power})"
    drawn = planned.request.routing != "balanced"
    return [
        *_tile_terms(planned),
        Term(
            "memory", "(weights read + rows) / (TB/s x efficiency)",
            f"{read} / ({g(device.memory_bytes_s / 1e12)} x 10^12 x {g(device.memory_efficiency)}) x 10^6",
            layer.memory_us, "us",
        ),
        Term(
            "both, without links", "(compute^p + memory^p)^(1/p), p = memory_overlap" + ", mean of the draws" * drawn,
            g(layer.alone_us) if drawn else alone, layer.alone_us, "us",
        ),
    ]  # fmt: skip


def _tile_terms(planned: Plan) -> list[Term]:
    """A tile of each product, all tiles over the SMs, and the rate of an expert that has many rows."""
    layer, expert, device = planned.layer, planned.request.expert, _device(planned)
    reached = reached_tflops(expert, device)
    rate = Term("rate reached", "of an expert with many rows, without memory and links", g(reached), reached, "TFLOP/s")
    request, rows = planned.request, layer.rows / layer.experts_touched
    slots = request.model.num_experts + request.redundant
    tiling = tiling_of(device, request.tokens_per_rank * request.ep * expert.topk / slots)
    block, step = tiling.block, tiling.step
    whole, last = int(rows // block), min(block, ceil(rows % block / step) * step)
    terms, parts = [], []
    for count, size, which in ((whole, block, "a tile"), (1, last, "the last tile" if whole else "a tile")):
        if count and size:
            across = (-(-n // COLUMNS) for _, n in expert.products)
            cost = " + ".join(f"{many} x {g(_tile(planned, size, k).value)}" for k, many in enumerate(across))
            parts.append(f"{count} x ({cost})")
            for k, name in enumerate(("Linear-1", "Linear-2")):
                terms.append(replace(_tile(planned, size, k), name=f"{which} of {name}, {size} rows"))
    faster = f" / {g(device.busy_rate)}" if device.busy_rate != 1 else ""
    spread = f"{g(layer.experts_touched)} x ({' + '.join(parts)}) / {g(device.sms)}{faster}"
    longest = sum(_tile(planned, step, k).value for k in range(len(expert.products))) / device.busy_rate
    shown = request.routing == "balanced" and layer.compute_us > longest * (1 + 1e-9)
    formula = "experts x tiles of its rows x (tiles of its columns x time of each) / SMs"
    formula += " / busy rate" if faster else ""
    least = layer.rows * expert.flops / device.tflops * 1e-6
    if faster and request.routing == "balanced" and layer.compute_us <= least * (1 + 1e-9):
        formula, shown = "rows x FLOPs of each / peak, which no busy rate exceeds", True
        spread = f"{g(layer.rows)} x {g(expert.flops)} / ({g(device.tflops)} x 10^6)"
    compute = Term("compute", formula, spread if shown else g(layer.compute_us), layer.compute_us, "us")
    return [*(terms if shown else []), compute, rate]


def _tile(planned: Plan, rows: int, product: int) -> Term:
    """One tile of rows x 128 over K, of the first product (0) or the second (1)."""
    expert, device = planned.request.expert, _device(planned)
    k = expert.products[product][0]
    size = f"{rows} x {COLUMNS}"
    tensor = f"2 x {size} x {k} / ({g(device.tflops)} x 10^6 / {g(device.sms)})"
    moved = f"({rows} x {g(device.operand_bytes)} + {COLUMNS} x {g(expert.weight_element_bytes)})"
    feed = f"{g(device.feed_ps)} x {moved} x {k} / 10^6"
    situ = f" x {g(SITU_EPILOGUE)}" if expert.situ and product == 0 else ""
    numbers = f"(max({tensor}, {feed})^3 + ({g(device.epilogue_ps)}{situ} x {size} / 10^6)^3)^(1 / 3)"
    formula = "3-norm of max(2 rows columns K / peak of an SM, feed (rows + columns in bytes) K), epilogue rows columns"
    formula += ", SiTU's longer" * bool(situ)
    return Term("tile", formula, numbers, expert_tile_us(expert, device, rows, product), "us")


def _link_terms(planned: Plan) -> list[Term]:
    """Both journeys over the tier that is slowest for them."""
    request, layer = planned.request, planned.layer
    expert, device = request.expert, _device(planned)
    sent = sent_once(expert, request.ep) if request.stack == "megamoe" else 1.0
    tiers = device.tiers(request.ep, sent=sent, once=request.once)
    own, there, back = request.tokens_per_rank * expert.topk, expert.dispatch_bytes, expert.combine_bytes
    row = row_us(device, request.ep, layer.rows, own, there, back, tiers, fused=True)
    slowest = row.tier
    if slowest is None:
        return []
    reached = g(device.fused_link_efficiency)
    if request.stack == "fused" and device.busy_rate != 1:
        reached = f"{g(device.fused_link_efficiency / device.busy_rate)} x {g(device.busy_rate)}"
    if slowest.name == "nic":
        rate = f"{g(device.nic_gb_s or 0)} x {g(device.nic_efficiency)}"
    else:
        crowd = min(1.0, (8 / min(request.ep, device.scaleup_domain)) ** device.link_congestion)
        rate = f"{g(device.scaleup_gb_s)} x {reached} x {g(crowd)}"
        incast = layer.dispatch_us / (layer.rows * row.there_us) * device.incast(layer.rows, own)  # a mean over draws
        rate += f" / {g(incast)}" if incast > 1 + 1e-9 else ""
    rest = f"{g(row.fuller)} / ({rate} x 1000)"
    formula = "rows x bytes x f_remote x fuller way / (GB/s x efficiency x congestion / incast)"
    if " x " in reached and slowest.name != "nic":
        formula = formula.replace("efficiency", "efficiency x busy rate")
    terms = [
        Term(
            f"link, {request.hardware.tier_names[slowest.name]}: {name}",
            formula if share == slowest.f_remote else formula.replace("f_remote", "tokens that cross for a row"),
            f"{g(layer.rows)} x {g(each)} x {g(share)} x {rest}",
            us,
            "us",
        )
        for name, each, share, us in (
            ("dispatch", there, slowest.f_dispatch, layer.dispatch_us),
            ("combine", back, slowest.f_remote, layer.combine_us),
        )
    ]
    both = f"{g(layer.dispatch_us)} + {g(layer.combine_us)}"
    return [*terms, Term("communication", "dispatch + combine", both, layer.communication_us, "us")]


def _wave_terms(planned: Plan) -> list[Term]:
    """The schedule as it was played: what the rank computes, what it waits for, what is left at the end."""
    request, layer, device = planned.request, planned.layer, _device(planned)
    exchange = 2 * device.exchange_us if request.ep > device.scaleup_domain else 0.0
    busy = layer.core_us - layer.stalls_us - layer.tail_us - exchange
    if request.routing == "balanced":
        p, waves = g(device.overlap), layer.waves
        both = (
            f"({g(layer.alone_us)}^{p} + {g(layer.communication_us)}^{p})^(1 / {p})" if waves > 1 else g(layer.alone_us)
        )
        numbers = f"{both} + {waves} x {g(device.wave_us)}"
    else:
        numbers = g(busy)
    parts = f"{g(busy)} + {g(layer.stalls_us)} + {g(layer.tail_us)}" + (f" + {g(exchange)}" if exchange else "")
    exposed = f"{layer.core_us:.10g} - {layer.alone_us:.10g}"
    formula = "(alone^p + link^p)^(1/p) + waves x wave_us, p = overlap; of one wave, which no link disturbs, alone"
    stalls, tail = "played: compute that waits for rows, head included", "played: last results under way"
    terms = [
        Term("waves: busy", formula, numbers, busy, "us"),
        Term("waves: stalls", stalls, g(layer.stalls_us), layer.stalls_us, "us"),
        Term("waves: tail", tail, g(layer.tail_us), layer.tail_us, "us"),
    ]
    if exchange:
        between = "2 x exchange_us, between domains"
        terms.append(Term("waves: exchange", between, f"2 x {g(device.exchange_us)}", exchange, "us"))
    whole = "busy + stalls + tail" + (" + exchange" if exchange else "")
    return [
        *terms,
        Term("waves", whole, parts, layer.core_us, "us"),
        Term("exposed", "waves - both without links", exposed, layer.exposed_us, "us"),
    ]


def _fixed_terms(planned: Plan) -> list[Term]:
    request, layer = planned.request, planned.layer
    expert, device = request.expert, _device(planned)
    tb_s = f"({g(device.memory_bytes_s / 1e12)} x 10^12 x {g(device.memory_efficiency)}) x 10^6"
    values = f"{request.tokens_per_rank} x {expert.hidden}"
    slots = request.model.num_experts + request.redundant
    kernel = f"{g(device.fixed_us)} + {g(device.expert_us)} x ceil({slots} / {request.ep}) + "
    kernel += f"{g(device.barrier_us)} x log2({request.ep})"
    staged = f"{g(device.staging_us)} + {values} x {g(device.staging_bytes)} / {tb_s}"
    summed = f"{values} x ({expert.topk} x {g(value_bytes(expert.combine_format))} + 2) / {tb_s}"
    summed_as = "T h (k b_combine + 2) / (TB/s x efficiency)"
    if device.slot_us and value_bytes(expert.combine_format) < 2:
        summed, summed_as = f"{summed} + {expert.topk} x {g(device.slot_us)}", f"{summed_as} + k slot_us"
    parts = f"{g(layer.kernel_us)} + {g(layer.graph_us)} + {g(layer.stack_us)}"
    module = [
        Term("fixed: graph", "a module's launches in a captured graph", g(device.graph_us), layer.graph_us, "us"),
        Term("fixed: staging", "staging + tokens read and written", staged, layer.stack_us, "us"),
    ]
    return [
        Term("fixed: kernel", "call + experts of a rank + barriers", kernel, layer.kernel_us, "us"),
        *(module if request.stack == "fused" else []),
        Term("fixed", "kernel + graph + staging", parts, layer.fixed_us, "us"),
        Term("slot sum", summed_as, summed, layer.sum_us, "us"),
    ]


def _device(planned: Plan) -> Device:
    """As the stack uses it."""
    request = planned.request
    return launched(request.device, request.profile) if request.stack == "megamoe" else request.device


def _staged_terms(planned: Plan) -> list[Term]:
    """Stages, and what is left of them where two halves overlap."""
    layer, request = planned.layer, planned.request
    links = f"{g(layer.dispatch_us)} + {g(layer.combine_us)}"
    drawn = "DeepEP, low latency: a call + experts + tokens of an SM + bytes / (GB/s x efficiency); normal: "
    drawn += "the longer of bytes / (GB/s x efficiency) and its SMs' time for the tokens"
    shown = "products + links that show" if request.two_batch else "dispatch + products + combine"
    parts = f"{g(layer.alone_us)} + {g(layer.exposed_us)}"
    return [
        Term("compute", "grouped products, tiles in whole waves over SMs", g(layer.compute_us), layer.compute_us, "us"),
        Term("memory", "weights and rows", g(layer.memory_us), layer.memory_us, "us"),
        Term(
            "products",
            "launches + p-norm of both, p = memory_overlap, expert by expert; at least the host's launches",
            g(layer.alone_us),
            layer.alone_us,
            "us",
        ),
        Term("dispatch", drawn, g(layer.dispatch_us), layer.dispatch_us, "us"),
        Term("combine", drawn, g(layer.combine_us), layer.combine_us, "us"),
        Term("communication", "dispatch + combine", links, layer.communication_us, "us"),
        Term("exposed", "links that nothing hides", g(layer.exposed_us), layer.exposed_us, "us"),
        Term("layer", shown, parts, layer.layer_us, "us"),
    ]
