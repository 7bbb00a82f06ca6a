"""The planner's report: one self-contained HTML page, drawn from plain numbers.

    ReportData --> render --> str            (data.py says what a page can hold; sections without data are left out)
                   write_report --> file

Nothing here computes a plan, and nothing is imported but the standard library.
"""

from __future__ import annotations

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
    Term,
    Tile,
    Timeline,
)
from megamoe.planner.report.html import render, write_report

__all__ = [
    "MemoryBar",
    "MemoryPart",
    "ParetoPoint",
    "ReportData",
    "Roofline",
    "RooflineTier",
    "Sensitivity",
    "Source",
    "Span",
    "Term",
    "Tile",
    "Timeline",
    "render",
    "write_report",
]
