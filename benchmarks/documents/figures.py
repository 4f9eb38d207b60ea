"""Pictures of measured figures: a pass's timeline, the engine beside other systems, the demo."""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree

from benchmarks.documents.drawing import BLUE, GREEN, GREY, LIGHT, ORANGE, Drawing
from benchmarks.documents.tables import MEASURED, ROOT, demo_rows, rates_of

SVG = "{http://www.w3.org/2000/svg}"
STREAMS = {"#2f6db3": "compute", "#d9822b": "disk"}
"""The colours of benchmarks/timeline.py."""

TICK = 200
"""Milliseconds between two ticks of its axis."""


@dataclass(frozen=True)
class Bar:
    """A job of a stream in a pass, in milliseconds since the pass began."""

    stream: str
    begin: float
    end: float


def bars_of_pass() -> list[Bar]:
    """The jobs of the measured pass that benchmarks/timeline.py drew, read off its SVG's rectangles."""
    tree = ElementTree.parse(ROOT / "results" / "limits" / "timeline.svg")
    groups = [group for group in tree.iter(f"{SVG}g") if group.attrib.get("id", "").startswith("xtick_")]
    ticks = [
        float(use.attrib["x"]) for group in groups for use in group.iter(f"{SVG}use") if "x" in use.attrib
    ]
    zero, scale = ticks[0], TICK / (ticks[1] - ticks[0])
    bars = []
    for path in tree.iter(f"{SVG}path"):
        fill = re.search(r"fill: (#\w+); stroke: #ffffff", path.attrib.get("style", ""))
        if fill and fill[1] in STREAMS and "clip-path" in path.attrib:
            across = [float(x) for x in re.findall(r"[ML] ([\d.]+)", path.attrib["d"])]
            bars.append(Bar(STREAMS[fill[1]], (min(across) - zero) * scale, (max(across) - zero) * scale))
    return bars


def draw_pass() -> str:
    """One overlapped pass: computation hides behind the disk, which is nearly always busy."""
    bars = bars_of_pass()
    end = max(bar.end for bar in bars)
    left, width = 132, 730
    drawing = Drawing(880, 232, "One decoding pass of OPT-1.3B with all weights on disk")
    title = "One pass of OPT-1.3B, every weight on disk, 16 sequences: the disk hardly waits"
    drawing.text(14, 28, title, 17, weight="bold")
    for stream, top, name, colour in (("disk", 48, "disk", ORANGE), ("compute", 116, "computation", BLUE)):
        mine = [bar for bar in bars if bar.stream == stream]
        busy = sum(bar.end - bar.begin for bar in mine) / end
        drawing.text(14, top + 24, name, 15, weight="bold")
        drawing.text(14, top + 44, f"{busy:.0%} busy", 14, fill=GREY)
        drawing.box(left, top, width, 56, LIGHT)
        for bar in mine:
            wide = (bar.end - bar.begin) / end * width
            drawing.box(left + bar.begin / end * width, top, wide - 0.8, 56, colour)
    for tick in range(0, int(end) + 1, TICK):
        drawing.text(left + tick / end * width, 194, f"{tick}", 13, anchor="middle", fill=GREY)
    axis = "milliseconds since the pass began; one bar is one layer"
    drawing.text(left + width, 218, axis, 13, anchor="end", fill=GREY)
    return drawing.svg()


def draw_offloaders() -> str:
    """The README's measured rows as bars: generated tokens per second, ours above theirs."""
    drawing = Drawing(
        880, 52 + 74 * len(MEASURED), "Generated tokens per second, Tierbench and other systems"
    )
    title = "Generated tokens per second, 512 prompt and 32 generated tokens"
    drawing.text(14, 28, title, 17, weight="bold")
    figures = [rates_of(row) for row in MEASURED]
    most = max(max(rates.ours, rates.theirs) for rates in figures)
    for index, (row, rates) in enumerate(zip(MEASURED, figures, strict=True)):
        top = 48 + 74 * index
        drawing.text(14, top + 22, row.model, 14, weight="bold")
        drawing.text(14, top + 42, f"{row.memory}, {row.machine}", 13, fill=GREY)
        pairs = (("Tierbench", rates.ours, BLUE), (row.title, rates.theirs, ORANGE))
        for line, (name, rate, colour) in enumerate(pairs):
            y = top + 26 * line
            drawing.text(330, y + 19, name, 13, anchor="end")
            drawing.box(340, y + 4, rate / most * 400, 21, colour)
            drawing.text(347 + rate / most * 400, y + 19, f"{rate:.2f}", 13)
        drawing.text(866, top + 33, f"{rates.ratio:.2f}×", 18, anchor="end", weight="bold")
    return drawing.svg()


def draw_demo() -> str:
    """The demo's accuracies with their intervals, and its throughput, policy by policy."""
    rows = demo_rows((ROOT / "docs" / "demo.md").read_text(encoding="utf-8"))
    entries, policies = (
        list(dict.fromkeys(row.entry for row in rows)),
        list(dict.fromkeys(row.policy for row in rows)),
    )
    colours = dict(zip(policies, (BLUE, ORANGE, GREEN), strict=True))
    most = max(row.rate for row in rows)
    drawing = Drawing(880, 86 + 56 * len(entries), "Accuracy and throughput of the demo's run entries")
    for index, policy in enumerate(policies):
        drawing.box(14 + 150 * index, 18, 14, 14, colours[policy])
        drawing.text(34 + 150 * index, 30, policy, 14)
    drawing.text(330, 62, "accuracy from 0 to 1, 95 % interval", 13, fill=GREY)
    drawing.text(610, 62, "total token/s", 13, fill=GREY)
    for index, entry in enumerate(entries):
        top = 76 + 56 * index
        drawing.text(14, top + 28, entry.replace("multiple_choice_separate_original", "multiple choice"), 12)
        drawing.box(330, top, 250, 48, LIGHT)
        for line, row in enumerate(row for row in rows if row.entry == entry):
            y, colour = top + 8 + 15 * line, colours[row.policy]
            drawing.box(330 + 250 * row.low, y, 250 * (row.high - row.low), 3, colour)
            drawing.box(327 + 250 * row.accuracy, y - 4, 6, 11, colour)
            drawing.box(610, y - 5, 190 * row.rate / most, 12, colour)
            drawing.text(616 + 190 * row.rate / most, y + 5, f"{row.rate:,.0f}", 11)
    return drawing.svg()
