"""The HTML report: well-formed, self-contained, escaped, complete in words, legible in both themes. No browser."""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from html.parser import HTMLParser
from itertools import combinations, count
from pathlib import Path
from typing import Any, Literal

import pytest

from megamoe.planner.answer import answer
from megamoe.planner.page import page
from megamoe.planner.question import ask
from megamoe.planner.report import sections
from megamoe.planner.report.charts.labels import Box, text_box
from megamoe.planner.report.data import (
    MemoryBar,
    MemoryPart,
    ParetoPoint,
    ReportData,
    Roofline,
    RooflineTier,
    Sensitivity,
    Source,
    Span,
    Tile,
    Timeline,
)
from megamoe.planner.report.render import render, templates
from megamoe.planner.report.words import amount, number, short, shorten, width, wrap
from megamoe.planner.serving.flops import Term

LIMIT_BYTES = 400_000
SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "br", "col", "wbr", "hr", "img", "link", "input"}


# ---- pages ----


def waves(num_waves: int, layer_us: float) -> Timeline:
    """A fixed cost, then waves whose compute waits once, then the sum of the slots."""
    head, slot = 0.1 * layer_us, 0.85 * layer_us / num_waves
    spans = [Span("fixed", "barriers", 0.0, 0.08 * layer_us, "fixed")]
    for wave in range(num_waves):
        start, name = head + wave * slot, f"wave {wave + 1}"
        spans.append(Span("dispatch", name, start - 0.02 * layer_us, start))
        if wave == 0:
            spans.append(Span("linear", f"{name} waits", 0.08 * layer_us, start, "stall"))
        spans.append(Span("linear", name, start, start + slot))
        spans.append(Span("combine", name, start + slot, start + slot + 0.6 * slot / num_waves))
    spans.append(Span("tail", "slot sum", 0.99 * layer_us, layer_us))
    return Timeline(tuple(spans), layer_us, head, 0.05 * layer_us)


def front(num_points: int, others: int = 0) -> tuple[ParetoPoint, ...]:
    best = [
        ParetoPoint(10.0 + 3 * i, 9000.0 * 0.8**i, f"EP{2 ** (i % 7)}, batch {7 * i + 1}", True, i == num_points // 2)
        for i in range(num_points)
    ]
    rest = [ParetoPoint(5 + (i * 37) % 89 + i / 1e4, 20.0 + (i * 131) % 1900, f"EP8, other {i}") for i in range(others)]
    return (*best, *rest)


TIERS = (RooflineTier("scale-up", 450.0), RooflineTier("nic", 50.0))
ROOFLINE = Roofline(TIERS, 1979.0, 1029.0, 12288.0, 12161.25, 490.75, "threshold")
MEMORY = MemoryBar("h100, 92 % of 80 GB", 73.625, (MemoryPart("routed experts", 51.375), MemoryPart("cache", 31.0625)))
MOVES = (
    Sensitivity("model.topk", 4502.5, 8740.25, 6615.0, "us"),
    Sensitivity("hardware.nic_gb_s", 8494.0, 5563.0, 6615.0, "us"),
    Sensitivity("profile.tile_rows", 6621.0, 6628.0, 6615.0, "us"),
    Sensitivity("profile.wave_us", 6615.0, 6615.0, 6615.0, "us"),
)
FULL = ReportData(
    title="deepseek-v4-pro on h100, EP16",
    verdict="EXPOSED",
    sentence="39580 > 12288 FLOPs/Byte over the nic (margin 0.31); needs 161 GB/s, has 50",
    tiles=(Tile("layer", 6615.0, "us", "4096 tokens a rank"), Tile("margin", 0.3105), Tile("kind", "paper")),
    warnings=("h100 holds less than is asked of it.",),
    timeline=waves(8, 6615.0),
    roofline=ROOFLINE,
    pareto=front(7, 30),
    memory=(MEMORY,),
    sensitivities=MOVES,
    terms=(Term("threshold", "6d / bytes / f", "6 x 3072 / 3 / 0.5", 12288.0, "FLOPs/Byte"),),
    sources=tuple(
        Source(f"h.{tag}", 450.5, "GB/s", tag, f"by {tag}") for tag in ("measured", "vendor", "derived", "assumed")
    ),
    assumptions=("Bandwidths are one way.",),
    version="megamoe 9.9",
    command="megamoe plan --ep 16",
    date="2031-02-03 04:05 UTC",
)
BARE = ReportData("nothing on cpu, EP1", "HIDDEN", "nothing travels")
PAGES = {
    "full": FULL,
    "bare": BARE,
    "one_wave": replace(FULL, timeline=waves(1, 424.0), pareto=front(1)),
    "64_waves": replace(FULL, timeline=waves(64, 2818.5), pareto=front(30, 5000)),
    "tiny": replace(
        FULL,
        timeline=waves(3, 1.4e-4),
        roofline=replace(
            ROOFLINE, tiers=(RooflineTier("wire", 1e-6),), peak_tflops=1e-5, achieved_tflops=9e-6, plan_tflops=1e-8
        ),
        memory=(MemoryBar("toy", 1e-6, (MemoryPart("all", 1e-7),)),),
        sensitivities=(Sensitivity("x", 1e-9, 3e-9, 2e-9, "us"),),
        tiles=(Tile("layer", 1.4e-9, "us"), Tile("none", 0.0), Tile("unknown", math.nan)),
    ),
    "huge": replace(
        FULL,
        timeline=waves(16, 7.5e12),
        roofline=replace(ROOFLINE, tiers=(RooflineTier("a link with a very long name " * 3, 4e9),), peak_tflops=2e9),
        memory=tuple(MemoryBar(f"group {i} " * 9, 1e3**i, (MemoryPart("weights " * 5, 1e6),)) for i in range(3)),
        sensitivities=tuple(replace(move, name=move.name * 6, high=9e15) for move in MOVES),
        tiles=(Tile("a label that is long " * 3, 5.6e15, "tokens/s per device"), Tile("infinite", math.inf)),
        title="a-very-long-name-" * 9,
    ),
    "no_front": replace(FULL, pareto=front(0, 12)),
    "no_pareto": replace(FULL, pareto=None),
    "nothing_travels": replace(
        FULL, roofline=replace(ROOFLINE, threshold_flops_per_byte=math.inf, plan_flops_per_byte=math.inf)
    ),
    "no_effect": replace(FULL, sensitivities=MOVES[-1:]),
}
rendered = cache(render)
every_page = pytest.mark.parametrize("data", PAGES.values(), ids=PAGES)


class Reader(HTMLParser):
    """Reads a page as a browser does, and notes what a browser would forgive."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.heads: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.pieces: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag not in ("wbr", "span", "code", "strong"):
            self.pieces.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)
        if "svg" not in self.open and tag not in VOID:
            self.wrong.append(f"<{tag}/> outside a drawing")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.heads += [value for name, value in attrs if name == "id" and value and value.startswith("h-")]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def everything(self) -> str:
        return "\n".join([self.text, *(value for _, value in self.attributes)])


@cache
def drawings(text: str) -> list[ET.Element]:
    """Every SVG of a page, read as XML: it must be well-formed by itself."""
    return [ET.fromstring(each) for each in re.findall(r"<svg\b.*?</svg>", text, re.DOTALL)]


def figures_of(text: str) -> list[ET.Element]:
    return [each for each in drawings(text) if each.get("role") == "img"]


# ---- form ----


@every_page
def test_page_is_well_formed(data: ReportData) -> None:
    text = rendered(data)
    read = Reader(text)
    assert read.wrong == []
    assert text.startswith("<!DOCTYPE html>")
    assert sorted(set(read.ids)) == sorted(read.ids)
    for name, value in read.attributes:
        if name in ("aria-labelledby", "aria-describedby"):
            assert value in read.ids
    for svg in drawings(text):
        numbers = [each.get(key, "0") for each in svg.iter() for key in ("x", "y", "cx", "cy", "r", "d", "viewBox")]
        assert not any(re.search(r"nan|inf|e[+-]?\d", each) for each in numbers)


@every_page
def test_page_needs_nothing_from_outside(data: ReportData) -> None:
    text = rendered(data)
    assert set(re.findall(r"https?://[^\"\s<]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|<script|<link|<iframe|<img|<base", text)
    assert not {"src", "href", "xlink:href", "srcset", "action", "onload"} & {
        name for name, _ in Reader(text).attributes
    }


@every_page
def test_page_is_small(data: ReportData) -> None:
    assert len(rendered(data).encode()) < LIMIT_BYTES


def test_the_same_data_gives_the_same_page_whatever_the_hash_seed() -> None:
    code = (
        "import hashlib; from tests.test_planner_report import PAGES, rendered; "
        "print(hashlib.sha256(''.join(map(rendered, PAGES.values())).encode()).hexdigest())"
    )
    root, pages = Path(__file__).parents[1], "".join(map(rendered, PAGES.values()))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == hashlib.sha256(pages.encode()).hexdigest()


# ---- words ----


def poisoned(value: Any, numbers: Iterator[int]) -> Any:
    """The same data with something to escape in every text that a user or a catalog could have written."""
    if isinstance(value, tuple):
        return tuple(poisoned(each, numbers) for each in value)
    if isinstance(value, str):
        return f"q{next(numbers)}<i>&'\""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    names = [each.name for each in fields(value) if each.name not in ("verdict", "kind")]
    return replace(value, **{name: poisoned(getattr(value, name), numbers) for name in names})


def test_every_text_is_escaped_and_arrives_as_it_was() -> None:
    numbers = count()
    text = rendered(poisoned(FULL, numbers))
    read = Reader(text)
    assert read.wrong == []
    assert "<i>" not in text
    assert not re.search(r"&(?!(amp|lt|gt|quot|#x?[0-9a-fA-F]+);)", text)
    whole = read.everything
    missing = [index for index in range(next(numbers)) if f"q{index}<i>&'\"" not in whole]
    assert missing == []
    assert [svg.tag for svg in drawings(text)]


def test_characters_that_xml_forbids_do_not_break_a_page() -> None:
    bad = "a\x00b\x0bc\ud800d\uffff"
    text = rendered(replace(FULL, title=bad, memory=(MemoryBar(bad, 1.0, (MemoryPart(bad, 0.5),)),)))
    assert Reader(text).wrong == []
    assert len(figures_of(text)) == len(figures_of(rendered(FULL)))
    text.encode("utf-8")


def plain(value: Any) -> Iterator[float]:
    """Every number of a record that is not infinite."""
    if isinstance(value, tuple):
        for each in value:
            yield from plain(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from plain(getattr(value, field.name))
    elif isinstance(value, float) and math.isfinite(value):
        yield value


@pytest.mark.parametrize("name", ["full", "one_wave", "tiny", "no_front", "no_effect"])
def test_every_number_of_the_data_stands_in_the_text(name: str) -> None:
    words = set(re.split(r"[\s()=:;]+", Reader(rendered(PAGES[name])).text.replace("\u00a0", " ")))
    words |= {word.rstrip(".,") for word in words}
    assert sorted({number(value) for value in plain(PAGES[name])} - words) == []


def test_waves_and_configurations_are_listed_in_words() -> None:
    text = Reader(rendered(PAGES["64_waves"])).text
    assert all(re.search(rf"wave {wave}\b", text) for wave in range(1, 65))
    pareto = PAGES["64_waves"].pareto or ()
    assert all(point.label in text for point in pareto if point.on_front)
    assert f"{len(pareto)} configurations, 30 " in text
    listed = [point.label for point in pareto if not point.on_front and f"\n{point.label}\n" in text]
    assert len(listed) == sections.LISTED


SECTIONS = {
    "timeline": "h-timeline",
    "roofline": "h-roofline",
    "pareto": "h-pareto",
    "memory": "h-memory",
    "sensitivities": "h-sensitivity",
    "terms": "h-terms",
    "sources": "h-inputs",
    "assumptions": "h-assumptions",
}


@pytest.mark.parametrize("field", SECTIONS)
def test_a_section_without_data_is_left_out_and_the_others_stay(field: str) -> None:
    whole = Reader(rendered(FULL)).heads
    assert sorted(whole) == sorted(SECTIONS.values())
    empty: list[Any] = [()] if field in ("terms", "sources", "assumptions") else [None]
    empty += [()] if field in ("pareto", "memory", "sensitivities") else []
    for value in empty:
        left = Reader(rendered(replace(FULL, **{field: value}))).heads
        assert left == [head for head in whole if head != SECTIONS[field]]


def test_a_page_without_any_data_holds_the_verdict_alone() -> None:
    text = rendered(BARE)
    read = Reader(text)
    assert read.heads == []
    title = f"{BARE.title} "
    assert read.text.split() == f"HIDDEN: {title} megamoe plan {title} HIDDEN {BARE.sentence}".split()


@pytest.mark.parametrize("verdict", ["HIDDEN", "EXPOSED"])
def test_the_verdict_is_a_word_and_not_only_a_colour(verdict: Literal["HIDDEN", "EXPOSED"]) -> None:
    text = rendered(replace(FULL, verdict=verdict))
    assert f"<strong>{verdict}</strong>" in text
    assert f"<title>{verdict}: " in text


# ---- drawings ----


@cache
def labels_of(svg: ET.Element) -> list[tuple[str, Box, bool]]:
    """Text, box by the estimate of words.width, and whether it is turned."""
    found = []
    for each in svg.iter(f"{SVG}text"):
        title = each.find(f"{SVG}title")
        text = (each.text or "") + ((title.tail or "") if title is not None else "")
        x, y, size = (float(each.get(key, "12")) for key in ("x", "y", "font-size"))
        box = text_box(x, y, text, size, each.get("text-anchor", "start"))
        turned = each.get("transform")
        found.append((text, _turned(box, turned) if turned else box, bool(turned)))
    return found


def _turned(box: Box, transform: str) -> Box:
    degrees, x, y = map(float, re.findall(r"-?[\d.]+", transform))
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    corners = [(a - x, b - y) for a in (box.left, box.right) for b in (box.top, box.bottom)]
    across, down = [a * cosine - b * sine + x for a, b in corners], [a * sine + b * cosine + y for a, b in corners]
    return Box(min(across), min(down), max(across), max(down))


@every_page
def test_no_label_leaves_its_drawing(data: ReportData) -> None:
    for svg in figures_of(rendered(data)):
        _, _, wide, high = map(float, svg.get("viewBox", "").split())
        sheet = Box(-1, -1, wide + 1, high + 1)
        outside = [text for text, box, _ in labels_of(svg) if not box.inside(sheet)]
        assert outside == [], svg.get("aria-label")


@every_page
def test_no_label_lies_on_another(data: ReportData) -> None:
    for svg in figures_of(rendered(data)):
        level = [(text, box) for text, box, turned in labels_of(svg) if not turned]
        inner = [(text, Box(box.left + 2, box.top + 2.5, box.right - 2, box.bottom - 2.5)) for text, box in level]
        clashes = [(a, b) for (a, first), (b, second) in combinations(inner, 2) if first.meets(second)]
        assert clashes == [], svg.get("aria-label")


@every_page
def test_shapes_stay_inside_their_drawings(data: ReportData) -> None:
    for svg in figures_of(rendered(data)):
        _, _, wide, high = map(float, svg.get("viewBox", "").split())
        for each in svg.iter(f"{SVG}path"):
            for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", each.get("d", "")):
                assert -1 <= float(x) <= wide + 1
                assert -1 <= float(y) <= high + 1
        for each in svg.iter(f"{SVG}circle"):
            assert 0 <= float(each.get("cx", "nan")) <= wide
            assert 0 <= float(each.get("cy", "nan")) <= high


@every_page
def test_every_drawing_has_a_name_and_says_in_words_what_it_shows(data: ReportData) -> None:
    for svg in figures_of(rendered(data)):
        assert svg.get("aria-label")
        description = svg.find(f"{SVG}desc")
        assert description is not None
        assert len(description.text or "") > 20


def test_the_key_figures_are_labelled_in_every_width() -> None:
    for svg in figures_of(rendered(FULL)):
        texts = " ".join(text for text, _, _ in labels_of(svg))
        if svg.get("aria-label") == "Roofline":
            expected = ("peak 1979", "achieved 1029", "12,288", "this plan", "scale-up 450", "nic 50")
            assert [word for word in expected if word not in texts] == []
        if svg.get("aria-label") == "Pareto front":
            chosen = next(point for point in FULL.pareto or () if point.chosen)
            assert chosen.label in texts


def test_a_timeline_s_bars_are_as_long_as_their_spans() -> None:
    line = waves(4, 400.0)
    svg = next(
        each for each in figures_of(rendered(replace(FULL, timeline=line))) if each.get("viewBox", "")[4:8] == "1080"
    )
    drawn = {}
    for bar in svg.iter(f"{SVG}path"):
        shape = re.fullmatch(r"M(-?[\d.]+) [\d.]+h([\d.]+)v[\d.]+h-[\d.]+z", bar.get("d", ""))
        named = bar.findtext(f"{SVG}title") or ""
        if shape and " to " in named:
            drawn[named] = (float(shape[1]), float(shape[2]))
    assert len(drawn) == len({(span.label, span.start_us, span.end_us) for span in line.spans})
    per_us = max(x + long for x, long in drawn.values()) - min(x for x, _ in drawn.values())
    for span in line.spans:
        title = next(each for each in drawn if span.label in each and f": {number(span.start_us)} to" in each)
        assert drawn[title][1] == pytest.approx((span.end_us - span.start_us) / 400 * per_us, abs=1.5)


# ---- themes ----


# text on its ground
TEXT_ON: tuple[tuple[str, str], ...] = (
    *((text, ground) for text in ("ink", "soft") for ground in ("bg", "panel")),
    *((text, f"{text}-bg") for text in ("good", "bad")),
    *(("ink", f"{ground}-bg") for ground in ("good", "bad")),
    ("good", "bg"),
    ("bad", "bg"),
    *((f"o{hue}", f"c{hue}") for hue in range(1, 8)),
    *((f"t{hue}", "bg") for hue in range(1, 7)),
)


def luminance(colour: tuple[float, ...]) -> float:
    """WCAG 2.2, relative luminance of sRGB from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5))


def over(colour: str, opacity: float, ground: str) -> tuple[float, ...]:
    return tuple(a * opacity + b * (1 - opacity) for a, b in zip(rgb(colour), rgb(ground), strict=True))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def themes(text: str) -> dict[str, dict[str, str]]:
    """The custom properties of a page's two themes, as its style sheet has them."""
    light, dark = re.findall(r":root\{([^}]*)\}", text)
    read = {
        name: dict(re.findall(r"--([\w-]+):(#[0-9a-f]{6})", each)) for name, each in (("light", light), ("dark", dark))
    }
    assert "prefers-color-scheme:dark" in text[: text.index(dark)]
    return read


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_theme_defines_every_colour_that_is_used(theme: str) -> None:
    text = "".join(map(rendered, PAGES.values()))
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert used
    assert used <= set(themes(rendered(FULL))[theme])
    rules = re.sub(r":root\{[^}]*\}", "", text)
    assert not re.search(r"#[0-9a-fA-F]{3,8}[;}]", rules)  # a colour outside of the themes has no dark twin


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("text", "ground"), TEXT_ON, ids=map("-on-".join, TEXT_ON))
def test_text_can_be_read_on_its_ground(theme: str, text: str, ground: str) -> None:
    colours = themes(rendered(FULL))[theme]
    assert contrast(rgb(colours[text]), rgb(colours[ground])) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_what_shines_through(theme: str) -> None:
    page_text, colours = rendered(FULL), themes(rendered(FULL))[theme]
    band, stall = (float(re.search(rf"\.{name}\{{[^}}]*opacity:([\d.]+)", page_text)[1]) for name in ("band", "stall"))  # type: ignore[index]
    for text in ("ink", "soft"):
        assert contrast(rgb(colours[text]), over(colours["bad"], band, colours["bg"])) >= 4.5
    for hue in range(1, 8):
        assert contrast(rgb(colours["ink"]), over(colours[f"c{hue}"], stall, colours["bg"])) >= 4.5


def test_every_class_that_is_drawn_has_a_rule() -> None:
    text = "".join(map(rendered, PAGES.values()))
    sheet = templates().get_template("page.css").render()
    used = {name for value in re.findall(r'class="([^"]*)"', text) for name in value.split()}
    # names that only other rules hang on, or that need none
    unstyled = {name for name in used if not re.search(rf"\.{re.escape(name)}(?![\w-])", sheet)}
    assert unstyled <= {"page", "plot", "key"}


# ---- words.py ----


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (6144.0, "6144"),
        (1.10592, "1.106"),
        (10655.2, "10,655"),
        (0.5, "0.5"),
        (0.0, "0"),
        (-0.25, "\u22120.25"),
        (999.96, "1000"),
        (math.inf, "\u221e"),
        (math.nan, "not known"),
        (1.234e-5, "1.234\u00d710\u207b\u2075"),
        (5.6e15, "5.6\u00d710\u00b9\u2075"),
    ],
    ids=str,
)
def test_numbers_read_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text


def test_short_numbers_of_axes() -> None:
    assert [short(value) for value in (0.5, 900.0, 20_000.0, 3e6, 5e10)] == ["0.5", "900", "20k", "3M", "50G"]


def test_shortened_and_wrapped_text_fits_its_room() -> None:
    text = "communication workspace (symmetric memory) of all ranks"
    for room in (3.0, 20.0, 77.7, 200.0, 1000.0):
        assert width(shorten(text, room, 11), 11) <= room or shorten(text, room, 11) == ""
        lines = wrap(text, room, 11, 2)
        assert 1 <= len(lines) <= 2
        assert all(width(line, 11) <= room for line in lines)
    assert shorten(text, 1000, 11) == text


# ---- from a plan ----


@pytest.mark.parametrize(
    "keys",
    [
        {"model": "deepseek-v4-pro", "hardware": "gb200", "ep": 16, "phase": "decode", "batch": 64, "context": 8192},
        {"model": "deepseek-v4-pro", "hardware": "h100", "ep": 16},
    ],
    ids=["decode", "exposed_over_a_nic"],
)
def test_the_page_of_a_plan_says_what_the_answer_says(keys: dict[str, Any]) -> None:
    found = answer(ask(keys))
    text = rendered(page(found, "megamoe plan"))
    read = Reader(text)
    assert read.wrong == []
    assert len(text.encode()) < LIMIT_BYTES
    words = read.text.replace("\u00a0", " ")
    said = found.as_dict()
    assert found.plan.sentence.partition("  ")[2] in words
    for key, unit in (("layer_us", "us"), ("required_link_gb_s", "GB/s"), ("exposed_us", "us"), ("memory_gb", "GB")):
        assert f"{number(said[key])} {unit}" in words
    if said["tpot_ms"] is not None:
        assert f"{number(said['tpot_ms'])} ms" in words
        assert amount(said["tokens_per_s_per_device"], "tokens/s").replace("\u00a0", " ") in words
    for svg in figures_of(text):
        _, _, wide, high = map(float, svg.get("viewBox", "").split())
        assert all(box.inside(Box(-1, -1, wide + 1, high + 1)) for _, box, _ in labels_of(svg))
