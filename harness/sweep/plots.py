"""Draws the pictures of a curve: accuracy, and distance from full precision, against bits as stored.

It knows matplotlib and rows. Three panels side by side hold the formats that compress weights, those that
compress or thin out the KV cache, and those that do both; every picture is written as PNG and as SVG.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import storage_errors
from engine.spec.float_format import MatrixForm
from engine.spec.kv_format import KVFormat
from engine.spec.quant import FORMATS, QuantSpec
from engine.spec.weight_formats import WeightFormats
from harness.report.plots.labels import place_labels
from harness.statistics import Verdict
from harness.sweep.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of harness.plots on a light ground.
_INK, _MUTED, _GRID, _PAPER = "#1b1f24", "#59636e", "#d5dae0", "#ffffff"
_OWN, _FLEXGEN = "#0072b2", "#d55e00"

_TICKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_DPI = 160


@dataclass(frozen=True)
class _Panel:
    """Formats that compress the same things, against the bits of those things."""

    title: str
    label: str
    rows: list[Row]
    bits: Callable[[Row], float]


@dataclass(frozen=True)
class _Mark:
    """One format in one panel."""

    row: Row
    x: float
    y: float
    low: float
    high: float


def draw(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write the pictures of a curve.

    Args:
        rows: full precision first.

    Raises:
        StorageError: if they cannot be written.
    """
    written = []
    panels = _panels(rows)
    if panels and rows[0].accuracy is not None:
        with _figure(1) as figure:
            _draw_accuracy(figure, panels, rows[0])
            written += _save(figure, folder / "accuracy_bits")
    measures = _measures(rows)
    if panels and measures:
        with _figure(len(measures)) as figure:
            _draw_distance(figure, panels, rows[0], measures)
            written += _save(figure, folder / "divergence")
    return written


def _panels(rows: Sequence[Row]) -> list[_Panel]:
    def compresses(row: Row) -> tuple[bool, bool]:
        return row.weight_quant != "16", row.kv_quant != "16" or row.attention_fraction < 1

    formats = [row for row in rows if row.verdict is not Verdict.REFERENCE]
    found = [
        _Panel("Weights", "bits per weight as stored", [], lambda row: row.weight_bits),
        _Panel("KV cache", "bits per value as stored", [], lambda row: row.kv_bits),
        _Panel("Both", "bits per value of weights and KV cache", [], lambda row: row.bits),
    ]
    for row in formats:
        weights, kv = compresses(row)
        found[2 if weights and kv else 1 if kv else 0].rows.append(row)
    return [panel for panel in found if panel.rows]


def _draw_accuracy(figure: Figure, panels: Sequence[_Panel], reference: Row) -> None:
    grid = _grid(figure, 1, panels)
    assert reference.accuracy_low is not None and reference.accuracy_high is not None
    for axes, panel in zip(grid[0], panels, strict=True):
        axes.axhspan(reference.accuracy_low, reference.accuracy_high, color=_GRID, alpha=0.55, linewidth=0)
        axes.axhline(reference.accuracy or 0, color=_MUTED, linewidth=1)
        marks = [
            _Mark(row, panel.bits(row), row.accuracy, row.accuracy_low or 0, row.accuracy_high or 0)
            for row in panel.rows
            if row.accuracy is not None
        ]
        _draw_marks(axes, marks)
    lows = [row.accuracy_low or 0 for panel in panels for row in [*panel.rows, reference]]
    highs = [row.accuracy_high or 0 for panel in panels for row in [*panel.rows, reference]]
    space = max(0.01, 0.12 * (max(highs) - min(lows)))
    grid[0][0].set_ylim(min(lows) - space, max(highs) + space)
    grid[0][0].set_ylabel(f"accuracy over {reference.instances:,} instances")
    _finish(figure, grid, panels, "Accuracy against compression, measured, with 95 % intervals")


_Measure = tuple[str, Callable[[Row], "tuple[float, float, float] | None"], float | None]


def _measures(rows: Sequence[Row]) -> list[_Measure]:
    """What is drawn of the distance from full precision: label, (value, low, high) of a row, reference."""
    found: list[_Measure] = []
    if any(row.kl is not None for row in rows):
        found.append(("KL(full || format), nats", lambda r: (r.kl and (r.kl, r.kl, r.kl)) or None, None))
    base = rows[0].answer_nll
    if base is not None:
        found.append(("nats per token of correct answers", lambda row: _around(base, row, "answer"), base))
    elif rows[0].text_bits_per_token is not None and rows[0].perplexity is not None:
        import math

        nll = math.log(rows[0].perplexity)
        found.append(("nats per token of running text", lambda row: _around(nll, row, "text"), nll))
    return found


def _around(base: float, row: Row, what: str) -> tuple[float, float, float] | None:
    """The reference's value plus the paired change and its interval."""
    change, low, high = (getattr(row, f"{what}_nll_change{end}") for end in ("", "_low", "_high"))
    return None if change is None else (base + change, base + low, base + high)


def _draw_distance(
    figure: Figure, panels: Sequence[_Panel], reference: Row, measures: Sequence[_Measure]
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    grid = _grid(figure, len(measures), panels)
    for line, (label, value, base) in zip(grid, measures, strict=True):
        line[0].set_ylabel(label)
        line[0].set_yscale("log")
        line[0].yaxis.set_major_locator(LogLocator(subs=(1,) if base is None else (1, 2, 5), numticks=9))
        line[0].yaxis.set_minor_locator(NullLocator())
        line[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        line[0].margins(y=0.12)
        for axes, panel in zip(line, panels, strict=True):
            found = [(row, value(row)) for row in panel.rows]
            marks = [_Mark(row, panel.bits(row), *three) for row, three in found if three is not None]
            if base is not None:
                axes.axhline(base, color=_MUTED, linewidth=1)
            _draw_marks(axes, marks)
    _finish(figure, grid, panels, "Distance from full precision against compression, measured")


def _draw_marks(axes: Axes, marks: Sequence[_Mark]) -> None:
    for mark in marks:
        color = _FLEXGEN if _is_flexgens(mark.row) else _OWN
        shape = "s" if _is_flexgens(mark.row) else "D" if mark.row.attention_fraction < 1 else "o"
        filled = mark.row.verdict is Verdict.ACCEPTED
        axes.plot([mark.x, mark.x], [mark.low, mark.high], color=color, linewidth=1.4, zorder=2)
        axes.plot(
            [mark.x], [mark.y], shape, color=color, markerfacecolor=color if filled else _PAPER, markersize=6,
            markeredgewidth=1.4, zorder=3,
        )  # fmt: skip
        if mark.row.cheapest:
            axes.plot([mark.x], [mark.y], "o", color=_INK, markerfacecolor="none", markersize=12, zorder=3)


def _is_flexgens(row: Row) -> bool:
    """Whether everything that is packed is grouped and rounded as FlexGen does, at any number of bits."""
    weights = WeightFormats.parse(row.weight_quant)
    forms = [form for form in (weights.default, *(form for _, form in weights.rules)) if form is not None]
    kv = None if row.kv_quant == "16" else KVFormat.parse(row.kv_quant)
    pairs: list[tuple[MatrixForm, QuantSpec]] = [(form, FORMATS["flexgen"]) for form in forms]
    if kv is not None:
        pairs += [(kv.keys, QuantSpec()), (kv.values, QuantSpec())]
    residual = kv is not None and kv.residual > 0
    return (
        bool(pairs)
        and not residual
        and all(isinstance(mine, QuantSpec) and mine == its.replace(bits=mine.bits) for mine, its in pairs)
    )


@contextmanager
def _figure(lines: int) -> Iterator[Figure]:
    """A figure of so many lines of panels."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans", "font.size": 8.5, "text.parse_math": False,
        "svg.hashsalt": "tierbench", "svg.fonttype": "none",
        "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _MUTED, "ytick.color": _MUTED,
        "axes.edgecolor": _GRID, "axes.facecolor": _PAPER, "figure.facecolor": _PAPER, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "xtick.major.size": 0, "ytick.major.size": 0,
        "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.titlesize": 9.5, "figure.titlesize": 11,
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(12, 0.9 + 3.5 * lines))
        FigureCanvasAgg(figure)
        yield figure


def _grid(figure: Figure, lines: int, panels: Sequence[_Panel]) -> list[list[Axes]]:
    """Panels side by side, one line per measure; the y axis is that of the line."""
    from matplotlib.ticker import FixedLocator, NullLocator

    height = figure.get_figheight()
    ratios = [max(1.6, len(panel.rows) ** 0.5) for panel in panels]
    grid = figure.subplots(
        lines, len(panels), squeeze=False, sharey="row", sharex="col", width_ratios=ratios,
        gridspec_kw={"left": 0.07, "right": 0.985, "top": 1 - 0.62 / height, "bottom": 0.85 / height,
                     "wspace": 0.06, "hspace": 0.1},
    )  # fmt: skip
    for column, panel in enumerate(panels):
        bits = [panel.bits(row) for row in panel.rows]
        grid[0][column].set_title(panel.title, loc="left", color=_INK)
        grid[-1][column].set_xlabel(panel.label)
        for axes in grid[:, column]:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(_TICKS))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlim(min(bits) / 1.3, max(bits) * 1.3)
            axes.grid(color=_GRID, linewidth=0.6)
    return [list(line) for line in grid]


def _finish(figure: Figure, grid: list[list[Axes]], panels: Sequence[_Panel], title: str) -> None:
    """Title, names of the formats, legend."""
    from matplotlib.lines import Line2D

    height = figure.get_figheight()
    figure.suptitle(title, x=0.07, y=1 - 0.14 / height, ha="left", va="top", color=_INK)
    for line in grid:
        for axes, panel in zip(line, panels, strict=True):
            place_labels(figure, axes, [row.format for row in panel.rows], color=_INK, leader=_MUTED)

    def marker(shape: str, color: str, fill: str, size: float = 6) -> Line2D:
        return Line2D(
            [], [], linestyle="none", marker=shape, color=color, markerfacecolor=fill, markersize=size,
            markeredgewidth=1.4,
        )  # fmt: skip

    entries = [
        ("accepted by the gate", marker("o", _OWN, _OWN)),
        ("not shown or rejected", marker("o", _OWN, _PAPER)),
        ("FlexGen's grouping", marker("s", _FLEXGEN, _PAPER)),
        ("sparse attention", marker("D", _OWN, _PAPER)),
        ("cheapest accepted", marker("o", _INK, "none", size=11)),
        ("full precision", Line2D([], [], color=_MUTED, linewidth=1)),
    ]
    names, handles = zip(*entries, strict=True)
    figure.legend(
        handles, names, loc="lower center", ncols=len(entries), frameon=False, bbox_to_anchor=(0.5, 0.0)
    )


def _save(figure: Figure, path: Path) -> list[Path]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    with storage_errors(path):
        figure.savefig(png, dpi=_DPI, metadata={"Software": None})
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]
