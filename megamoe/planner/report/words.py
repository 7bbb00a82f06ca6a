"""Numbers as people read them, and how much room text takes."""

from __future__ import annotations

import math
import re
from html import escape

NBSP = "\u00a0"
MINUS = "\u2212"
ELLIPSIS = "\u2026"
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_SHORT = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

# Widths in ems, of the widest face that the page's font list commonly ends in (DejaVu Sans, bold where it is wider):
# a label that fits by these fits in narrower faces too.
_NARROW = frozenset("iIjl|'.,:; ")
_SLIM = frozenset('ftr()[]/-"!`\u00b7\u00a0')
_WIDE = frozenset("mwMW%@\u2026\u2192\u2264\u2265")


def number(value: float) -> str:
    """Four significant digits, no zeros at the end; whole numbers in full below ten million.

    6144.0 -> 6144    1.10592 -> 1.106    10655.2 -> 10,655    1.2e-05 -> 1.2 times ten to the -5
    """
    if math.isnan(value):
        return "not known"
    if math.isinf(value):
        return f"{MINUS}∞" if value < 0 else "∞"
    if value < 0:
        return MINUS + number(-value)
    if value == 0:
        return "0"
    if not 1e-3 <= value < 1e7:
        return _scientific(value)
    if value >= 1000 or value == int(value):
        return _grouped(round(value))
    digits = 3 - math.floor(math.log10(value))
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")


def _grouped(value: int) -> str:
    return f"{value:,}" if value >= 10_000 else str(value)


def _scientific(value: float) -> str:
    digits, power = f"{value:.3e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}\u00d710{str(int(power)).translate(_SUPERSCRIPT)}"


def short(value: float) -> str:
    """For axes: 20,000 -> 20k."""
    for size, letter in _SHORT:
        if 10 * size <= abs(value) < 1e15 or (size > 1e3 and size <= abs(value) < 1e15):
            return number(value / size) + letter
    return number(value)


def amount(value: float | str, unit: str = "") -> str:
    """A value and its unit, which no line break parts."""
    text = value if isinstance(value, str) else number(value)
    return f"{text}{NBSP}{unit}" if unit else text


def percent(change: float) -> str:
    """A change with its sign: 0.081 -> +8.1 %."""
    if not math.isfinite(change):
        return "not known"
    points = abs(change) * 100
    digits = f"{points:.0f}" if points >= 99.95 else f"{points:.1f}"
    sign = "" if float(digits) == 0 else MINUS if change < 0 else "+"
    return f"{sign}{digits}{NBSP}%"


def width(text: str, size: float) -> float:
    """An upper estimate of how wide a line of text is, in the units of size."""
    return size * sum(map(_em, text))


def _em(letter: str) -> float:
    if letter in _NARROW:
        return 0.36
    if letter in _SLIM:
        return 0.46
    if letter in _WIDE or ord(letter) > 0x2E7F:
        return 1.02
    return 0.76 if letter.isupper() else 0.64


def shorten(text: str, room: float, size: float) -> str:
    """The beginning of text that fits into room, with an ellipsis where something is left out; maybe nothing."""
    if width(text, size) <= room:
        return text
    while text and width(text + ELLIPSIS, size) > room:
        text = text[:-1]
    return text.rstrip() + ELLIPSIS if text else ""


def wrap(text: str, room: float, size: float, most: int) -> list[str]:
    """Lines no wider than room, at most so many; what does not fit is left out of the last, with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(lines) == most or not lines[-1] or width(longer, size) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return [shorten(line, room, size) for line in lines]


def safe(text: str) -> str:
    """For HTML, XML and attribute values. Characters that XML forbids become U+FFFD."""
    kept = "".join(
        c if c in "\t\n\r" or (ord(c) >= 0x20 and ord(c) not in (0x7F, 0xFFFE, 0xFFFF)) else "\ufffd" for c in text
    )
    return escape(kept.encode("utf-8", "replace").decode("utf-8"), quote=True)


def breakable(text: str) -> str:
    """For HTML: long names may break after their dots, slashes and underscores."""
    return re.sub(r"([A-Za-z]{3}[./_])(?=[A-Za-z]{2})", r"\1<wbr>", safe(text))
