"""Draws accuracy, perplexity, divergence and agreement against bits, over all run entries and for each.

It knows points of `harness.report.analysis.bits`; colours and SVG are `harness.report.plots.style`'s matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from harness.escape import shortened
from harness.report.analysis.bits import MARKS, SERIES, BitPoint, Bits, points_at
from harness.report.plots.labels import place_labels
from harness.report.plots.style import (
    GRID,
    INK,
    MUTED,
    color_of,
    legend,
    marker_of,
    panel_axes,
    picture,
    upright,
)
from harness.report.tables import Mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TICKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_SERIES_WORDS = {
    "weights": "compresses weights: bits per weight",
    "KV cache": "compresses the KV cache: bits per value",
    "both": "compresses both: bits per value of both",
}


def accuracy(bits: Bits, suffix: str = "") -> str:
    """Accuracy with intervals against bits, with full precision and the two marks as lines."""
    series = [name for name in SERIES if points_at(bits.points, name)]
    with picture(3.2 + 0.2 * len(series), f"bits-accuracy{suffix}") as (figure, done):
        axes = panel_axes(figure, left=0.13, legend_lines=len(series) + 1)
        full = bits.reference.accuracy
        assert full is not None
        _reference(axes, full, marks=True)
        names = _series(axes, bits.points, lambda point: point.accuracy)
        _bit_axis(axes, bits.points)
        axes.set_ylabel(f"mean accuracy, {bits.kind}")
        place_labels(figure, axes, [shortened(name, 22) for name in names], INK, MUTED)
        _legend(figure, series, marks=True)
    return done[0]


def entries(bits: Bits, suffix: str = "") -> str:
    """The same for every run entry, in small panels."""
    shown = bits.entries
    series = [name for name in SERIES if points_at(bits.points, name)]
    rows = -(-len(shown) // 2)
    with picture(rows * 1.35 + 0.2 * len(series) + 0.1, f"bits-entries{suffix}") as (figure, done):
        for place, entry in enumerate(shown):
            axes = panel_axes(
                figure, rows=rows, position=place // 2, left=0.09 + 0.5 * (place % 2),
                right=0.48 + 0.5 * (place % 2), legend_lines=len(series),
            )  # fmt: skip
            _reference(axes, dict(bits.reference.entries)[entry], marks=False)
            _series(axes, bits.points, lambda point, entry=entry: dict(point.entries).get(entry))  # type: ignore[misc]
            _bit_axis(axes, bits.points, small=True)
            axes.set_ylim(-0.04, 1.04)
            axes.set_yticks([0, 0.5, 1])
            axes.set_title(shortened(entry, 28), loc="left", color=INK, fontsize=7.6)
        _legend(figure, series)
    return done[0]


def distances(bits: Bits, suffix: str = "") -> str:
    """Perplexity, mean KL divergence and top-token agreement, one above the other."""
    panels = [(title, value, log) for title, value, log in _MEASURES if _has(bits, value)]
    series = [name for name in SERIES if points_at(bits.points, name)]
    with picture(len(panels) * 1.55 + 0.2 * len(series) + 0.3, f"bits-distances{suffix}") as (figure, done):
        for place, (title, value, log) in enumerate(panels):
            axes = panel_axes(figure, rows=len(panels), position=place, left=0.13, legend_lines=len(series))
            reference = value(bits.reference)
            if reference is not None and not log:
                axes.axhline(reference, color=MUTED, linewidth=1)
            names = _series(axes, bits.points, lambda p, v=value: _bare_mean(v(p)))  # type: ignore[misc]
            if log:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_formatter(lambda value, _: "")
                axes.tick_params(which="minor", size=0)
            _bit_axis(axes, bits.points, small=place < len(panels) - 1)
            axes.set_title(f"{title}, {bits.kind}", loc="left", color=INK)
            place_labels(figure, axes, [shortened(name, 18) for name in names], INK, MUTED)
        _legend(figure, series)
    return done[0]


_Value = Callable[[BitPoint], float | None]
_MEASURES: tuple[tuple[str, _Value, bool], ...] = (
    ("perplexity of running text", lambda point: point.perplexity, False),
    ("mean KL divergence from full precision, nats", lambda point: point.kl, True),
    ("top-token agreement with full precision", lambda point: point.agreement, False),
)


def has_distances(bits: Bits) -> bool:
    """Whether any of `distances` was measured."""
    return any(_has(bits, value) for _, value, _ in _MEASURES)


def _has(bits: Bits, value: _Value) -> bool:
    return any(value(point) is not None for point in bits.points[1:])


def _bare_mean(value: float | None) -> Mean | None:
    return None if value is None else Mean(value, None, None)


def _reference(axes: Axes, full: Mean, marks: bool) -> None:
    if full.low is not None and full.high is not None:
        axes.axhspan(full.low, full.high, color=GRID, alpha=0.45, linewidth=0)
    axes.axhline(full.value, color=MUTED, linewidth=1.1)
    if not marks:
        return
    for mark in MARKS:
        axes.axhline(full.value * mark, color=MUTED, linewidth=0.7, linestyle=(0, (4, 3)))


def _series(axes: Axes, points: Sequence[BitPoint], value: Callable[[BitPoint], Mean | None]) -> list[str]:
    """Draw every series; returns the names of the points in the order in which they were plotted."""
    names = []
    for name in SERIES:
        index = SERIES.index(name)
        for point in points_at(points, name):
            mean = value(point)
            if mean is None:
                continue
            assert point.x is not None
            if mean.low is not None and mean.high is not None:
                upright(axes, point.x, mean.low, mean.high, color_of(index))
            axes.plot([point.x], [mean.value], marker_of(index), color=color_of(index), markersize=5)
            names.append(point.name)
    return names


def _bit_axis(axes: Axes, points: Sequence[BitPoint], small: bool = False) -> None:
    from matplotlib.ticker import NullLocator

    found = [point.x for point in points if point.x is not None and point.series]
    low, high = min(found) / 1.25, max(found) * 1.25
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    if len(ticks) < 3:  # formats that lie close together
        low, high = low / 1.6, high * 1.6
        axes.set_xlim(low, high)
        ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color=GRID, linewidth=0.6)
    if not small:
        axes.set_xlabel("bits per value as stored")


def _legend(figure: object, series: Sequence[str], marks: bool = False) -> None:
    entries = [("full precision; dashed: 99.9 % and 99 % of it", MUTED, "_")] if marks else []
    entries += [(_SERIES_WORDS[n], color_of(SERIES.index(n)), marker_of(SERIES.index(n))) for n in series]
    legend(figure, entries)  # type: ignore[arg-type]
