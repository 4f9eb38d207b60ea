"""Draws accuracy and distance from full precision against bits, for reports and for the command `curve`.

It knows points of `harness.report.analysis.bits`; colours and SVG are `harness.report.plots.style`'s matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.files.whole import write_whole
from harness.escape import shortened
from harness.report.analysis.bits import MARKS, SERIES, BitPoint, Bits, points_at, read_curve
from harness.report.content import Mean
from harness.report.plots.labels import place_labels
from harness.report.plots.style import (
    GRID,
    INK,
    MUTED,
    PAPER,
    WIDTH,
    color_of,
    legend,
    marker_of,
    panel_axes,
    picture,
    standing_alone,
    titled,
    upright,
)
from harness.statistics import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVE_WIDTH = 8.0
_TICKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_SERIES_WORDS = {
    "weights": "compresses weights: bits per weight",
    "KV cache": "compresses the KV cache: bits per value",
    "both": "compresses both: bits per value of both",
}
_Value = Callable[[BitPoint], Mean | None]


def write_curve(folder: Path) -> list[Path]:
    """Draw the curve.json of a folder: accuracy_bits and divergence, each as PNG and SVG.

    Raises:
        UsageError: if there is no curve, or it is damaged.
        StorageError: if the pictures cannot be written.
    """
    bits = read_curve(folder / "curve.json")
    written = []
    for name, wanted, draw, alt in (
        ("accuracy_bits", has_accuracy, accuracy, "Mean accuracy against bits"),
        ("divergence", has_distances, distances, "Distance from full precision against bits"),
    ):
        if bits is not None and wanted(bits):
            svg, png = folder / f"{name}.svg", folder / f"{name}.png"
            drawn = draw(bits, name, _CURVE_WIDTH, png)
            write_whole(svg, standing_alone(titled(drawn, name, f"{alt}, {bits.source}")))
            written += [png, svg]
    return written


def has_accuracy(bits: Bits) -> bool:
    """Whether there is a format to set beside full precision."""
    return bits.reference.accuracy is not None and any(p.x and p.accuracy for p in bits.points[1:])


def accuracy(bits: Bits, name: str, width: float = WIDTH, png: Path | None = None) -> str:
    """Accuracy with intervals against bits, with full precision and the two marks as lines."""
    entries = [("full precision; dashed: 99.9 % and 99 % of it", MUTED, "_"), *_entries(bits)]
    with picture(0.55 * width + 0.2 * len(entries) + 0.8, name, width, png) as (figure, done):
        axes = panel_axes(figure, left=0.52 / width, legend_lines=len(entries))
        full = bits.reference.accuracy
        assert full is not None
        _reference(axes, full, marks=True)
        _points(figure, axes, bits.points, lambda point: point.accuracy)
        _bit_axis(axes, bits.points)
        axes.set_xlabel("bits per value as stored")
        instances = f", {bits.instances}" if bits.instances and width > WIDTH else ""
        axes.set_ylabel(f"mean accuracy, {bits.kind}{instances}")
        legend(figure, entries)
    return done[0]


def entries(bits: Bits, name: str) -> str:
    """The same for every run entry, in small panels."""
    shown, lines = bits.entries, _entries(bits)
    rows = -(-len(shown) // 2)
    with picture(rows * 1.35 + 0.2 * len(lines) + 0.1, name) as (figure, done):
        for place, entry in enumerate(shown):
            axes = panel_axes(
                figure, rows=rows, position=place // 2, left=0.09 + 0.5 * (place % 2),
                right=0.48 + 0.5 * (place % 2), legend_lines=len(lines),
            )  # fmt: skip
            _reference(axes, dict(bits.reference.entries)[entry], marks=False)
            _points(None, axes, bits.points, lambda point, entry=entry: dict(point.entries).get(entry))  # type: ignore[misc]
            _bit_axis(axes, bits.points)
            axes.set_ylim(-0.04, 1.04)
            axes.set_yticks([0, 0.5, 1])
            axes.set_title(shortened(entry, 28), loc="left", color=INK, fontsize=7.6)
        legend(figure, lines)
    return done[0]


def has_distances(bits: Bits) -> bool:
    """Whether any of `distances` was measured."""
    return any(_has(bits, value) for _, value, _ in _MEASURES)


def distances(bits: Bits, name: str, width: float = WIDTH, png: Path | None = None) -> str:
    """Likelihoods, mean KL divergence and top-token agreement, one above the other."""
    panels = [(title, value, log) for title, value, log in _MEASURES if _has(bits, value)]
    lines = _entries(bits)
    height = len(panels) * (0.55 + 0.25 * width) + 0.2 * len(lines) + 0.3
    with picture(height, name, width, png) as (figure, done):
        for place, (title, value, log) in enumerate(panels):
            axes = panel_axes(
                figure, rows=len(panels), position=place, left=0.52 / width, legend_lines=len(lines)
            )
            reference = value(bits.reference)
            if reference is not None and not log:
                axes.axhline(reference.value, color=MUTED, linewidth=1)
            if log:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_formatter(lambda value, _: "")
                axes.tick_params(which="minor", size=0)
            _bit_axis(axes, bits.points)
            axes.set_title(f"{title}, {bits.kind}", loc="left", color=INK)
            axes.margins(y=0.12)
            _points(figure, axes, bits.points, value)
        legend(figure, lines)
    return done[0]


def _bare(value: float | None) -> Mean | None:
    return None if value is None else Mean(value, None, None)


_MEASURES: tuple[tuple[str, _Value, bool], ...] = (
    ("nats per token of correct answers", lambda point: point.answer_nll, False),
    ("perplexity of running text", lambda point: _bare(point.perplexity), False),
    ("mean KL divergence from full precision, nats", lambda point: _bare(point.kl), True),
    ("top-token agreement with full precision", lambda point: _bare(point.agreement), False),
)


def _has(bits: Bits, value: _Value) -> bool:
    return any(value(point) is not None for point in bits.points[1:])


def _reference(axes: Axes, full: Mean, marks: bool) -> None:
    if full.low is not None and full.high is not None:
        axes.axhspan(full.low, full.high, color=GRID, alpha=0.45, linewidth=0)
    axes.axhline(full.value, color=MUTED, linewidth=1.1)
    if marks:
        for mark in MARKS:
            axes.axhline(full.value * mark, color=MUTED, linewidth=0.7, linestyle=(0, (4, 3)))


def _points(figure: Figure | None, axes: Axes, points: Sequence[BitPoint], value: _Value) -> None:
    """Draw every series, with the names of its formats where the figure is given."""
    names = []
    for index, series in enumerate(SERIES):
        for point in points_at(points, series):
            mean = value(point)
            if mean is None:
                continue
            assert point.x is not None
            color = color_of(index)
            if mean.low is not None and mean.high is not None:
                upright(axes, point.x, mean.low, mean.high, color)
            at = [point.x], [mean.value]
            fill = color if point.verdict in ("", Verdict.ACCEPTED) else PAPER
            axes.plot(*at, marker_of(index), color=color, markerfacecolor=fill, markersize=5)
            if point.cheapest:
                axes.plot(*at, "o", color=INK, markerfacecolor="none", markersize=11)
            names.append(point.name)
    if figure is not None:
        most = 22 if figure.get_figwidth() <= WIDTH else 30
        place_labels(figure, axes, [shortened(name, most) for name in names], INK, MUTED)


def _bit_axis(axes: Axes, points: Sequence[BitPoint]) -> None:
    from matplotlib.ticker import NullLocator

    found = [point.x for point in points if point.x is not None and point.series]
    low, high = min(found) / 1.25, max(found) * 1.25
    if len([tick for tick in _TICKS if low <= tick <= high]) < 3:  # formats that lie close together
        low, high = low / 1.6, high * 1.6
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, linewidth=0.6)


def _entries(bits: Bits) -> list[tuple[str, str, str]]:
    """What a legend says of the points."""
    lines = [
        (_SERIES_WORDS[name], color_of(index), marker_of(index))
        for index, name in enumerate(SERIES)
        if points_at(bits.points, name)
    ]
    if any(point.verdict not in ("", Verdict.ACCEPTED) for point in bits.points[1:]):
        lines.append(("hollow: not accepted by the gate", MUTED, "frame"))
    if any(point.cheapest for point in bits.points):
        lines.append(("ring: cheapest that is accepted", INK, "ring"))
    return lines
