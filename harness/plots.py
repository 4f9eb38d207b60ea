"""Draws the pictures of a report as SVG texts whose colours follow the reader's light or dark setting.

It knows matplotlib and the nouns of the report; it writes no file. Every text is taken literally
(no mathematics, no markup), and the same data give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engine.units import GIB, KIB, MIB, format_bytes
from harness.report_content import compared_entries, kinds, mean_accuracy, per_second
from harness.report_data import PolicyRun, Result, SuiteResults
from harness.report_text import plain, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that matplotlib draws with; each becomes a CSS variable of the page. Two sets of series
# colours, one per background, after Okabe and Ito (told apart by all common kinds of colour vision).
_INK, _MUTED, _GRID, _PAPER = "#010101", "#020202", "#030303", "#040404"
_LIGHT = ("#0072b2", "#d55e00", "#00805e", "#b0568c", "#8c6d00", "#5a6472")
_DARK = ("#56b4e9", "#ff8f4a", "#35c89b", "#e795c6", "#e3c23c", "#a7b0bd")
_LANE_LIGHT = ("#3f4a58", "#b0568c", "#8c6d00", "#217a8e")
_LANE_DARK = ("#c9d0d9", "#e795c6", "#e3c23c", "#6fc7d9")
_SERIES = tuple(f"#0a0a{index:02x}" for index in range(len(_LIGHT)))
_LANE_SERIES = tuple(f"#0b0b{index:02x}" for index in range(len(_LANE_LIGHT)))
_MARKERS = "osD^vP"


def _variables(
    ink: str, muted: str, grid: str, paper: str, series: Sequence[str], lanes: Sequence[str]
) -> str:
    named = {"ink": ink, "muted": muted, "grid": grid, "paper": paper}
    named |= {str(index): color for index, color in enumerate(series)}
    named |= {f"lane{index}": color for index, color in enumerate(lanes)}
    return "svg.tb{" + "".join(f"--tb-{name}:{color};" for name, color in named.items()) + "}"


STYLE = (
    _variables("#1b1f24", "#59636e", "#d5dae0", "#ffffff", _LIGHT, _LANE_LIGHT)
    + "@media (prefers-color-scheme:dark){"
    + _variables("#e6e9ee", "#a3adb9", "#3a424d", "#14171c", _DARK, _LANE_DARK)
    + "}"
)
"""The style sheet that the pictures need, in a page or in a file of their own."""

_VARIABLES = {
    _INK: "ink", _MUTED: "muted", _GRID: "grid", _PAPER: "paper",
    **{color: str(index) for index, color in enumerate(_SERIES)},
    **{color: f"lane{index}" for index, color in enumerate(_LANE_SERIES)},
}  # fmt: skip

_WIDTH = 4.0  # inches; 384 CSS pixels, so that the letters stay readable on a narrow screen
_LANES = ("compute", "weights", "kv_in", "kv_out")


def accuracy(suite: SuiteResults) -> str:
    """Per run entry and policy the accuracy with its 95 % interval, and the mean over run entries."""
    groups: list[tuple[str, list[tuple[int, float, float | None, float | None]]]] = []
    for entry in suite.run_entries:
        found = [(i, suite.result(entry, p.name)) for i, p in enumerate(suite.policies)]
        points = [_point(i, result) for i, result in found if result is not None and result.is_accuracy]
        if points:
            groups.append((entry, points))
    means = [(i, mean_accuracy(suite, p.name)) for i, p in enumerate(suite.policies)]
    shown = [(i, mean.value, mean.low, mean.high) for i, mean in means if mean is not None]
    if shown and len(compared_entries(suite)) > 1:
        groups.append((f"mean of {len(compared_entries(suite))} run entries", shown))
    lines = sum(len(points) + 1.6 for _, points in groups)
    legend = [p.name for p in suite.policies]
    with _figure(0.19 * lines + 0.2 * len(legend) + 0.75, "accuracy") as (figure, done):
        axes = _axes(figure, legend_lines=len(legend))
        at = 0.0
        for title, points in groups:
            axes.text(0, at, shortened(title, 54), va="center", ha="left", color=_INK)
            for index, value, low, high in points:
                at += 1
                if low is not None and high is not None:
                    axes.plot(
                        [low, high], [at, at], color=_color(index), linewidth=1.6, solid_capstyle="butt"
                    )
                axes.plot([value], [at], _marker(index), color=_color(index), markersize=5, clip_on=False)
            at += 1.6
        axes.set_ylim(at - 0.8, -0.9)
        axes.set_xlim(0, 1)
        axes.set_yticks([])
        axes.set_xlabel(f"accuracy with 95 % interval, {kinds(suite)}")
        axes.grid(axis="x", color=_GRID, linewidth=0.7)
        _legend(figure, [(name, _color(i), _marker(i)) for i, name in enumerate(legend)])
    return done[0]


def _point(index: int, result: Result) -> tuple[int, float, float | None, float | None]:
    assert result.value is not None
    return index, result.value, result.low, result.high


def throughput(suite: SuiteResults) -> str:
    """Generated and total token/s per policy, as bars from zero."""
    panels = [
        (f"generated token/s, {kinds(suite)}", [p.generated_per_second for p in suite.policies]),
        (f"prompt and generated token/s, {kinds(suite)}", [p.total_per_second for p in suite.policies]),
    ]
    count = len(suite.policies)
    with _figure(2 * (0.4 * count + 0.75), "throughput") as (figure, done):
        for position, (title, rates) in enumerate(panels):
            axes = _axes(figure, rows=2, position=position)
            top = max([rate for rate in rates if rate is not None], default=1.0) or 1.0
            for index, (policy, rate) in enumerate(zip(suite.policies, rates, strict=True)):
                axes.barh(index + 0.2, rate or 0, height=0.36, color=_color(index), linewidth=0)
                value = "not measured" if rate is None else per_second(rate)
                axes.text(0, index - 0.2, shortened(policy.name, 44), va="center", color=_INK)
                axes.text((rate or 0) + top * 0.015, index + 0.2, value, va="center", color=_INK)
            axes.set_title(title, loc="left", color=_INK)
            axes.set_xlim(0, top * 1.2)
            _bare(axes, count)
    return done[0]


def lanes(suite: SuiteResults) -> str:
    """Busy share of every lane, a group of bars per policy."""
    names = _lane_names(suite.policies)
    lines = sum(len(p.lanes) + 1.5 for p in suite.policies)
    with _figure(0.2 * lines + 0.65, "lanes") as (figure, done):
        axes = _axes(figure)
        top = max([lane.share for p in suite.policies for lane in p.lanes] + [1.0])
        at = 0.0
        for policy in suite.policies:
            axes.text(0, at, shortened(policy.name, 54), va="center", color=_INK)
            for lane in policy.lanes:
                at += 1
                color = _LANE_SERIES[names.index(lane.lane) % len(_LANE_SERIES)]
                axes.barh(at, lane.share, height=0.66, color=color, linewidth=0)
                axes.text(
                    lane.share + 0.012, at, f"{plain(lane.lane)} {lane.share:.2f}", va="center", color=_INK
                )
            at += 1.5
        axes.set_ylim(at - 0.7, -0.9)
        axes.set_xlim(0, top * 1.24)
        axes.set_yticks([])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel(f"busy seconds / seconds of all passes, {kinds(suite)}")
        axes.grid(axis="x", color=_GRID, linewidth=0.7)
    return done[0]


def timeline(suite: SuiteResults) -> str:
    """One pass of every policy that has a trace: which lane worked when."""
    policies = [p for p in suite.policies if p.excerpt is not None]
    names = _lane_names(policies)
    with _figure(len(policies) * (0.2 * len(names) + 0.72), "timeline") as (figure, done):
        for position, policy in enumerate(policies):
            excerpt = policy.excerpt
            assert excerpt is not None
            axes = _axes(figure, rows=len(policies), position=position, left=0.15)
            factor, unit = (1e3, "ms") if excerpt.seconds < 1 else (1.0, "s")
            for row, lane in enumerate(names):
                spans = [s for s in excerpt.spans if s.lane == lane]
                bars = [(s.begin * factor, (s.end - s.begin) * factor) for s in spans]
                axes.broken_barh(
                    bars,
                    (row - 0.38, 0.76),
                    facecolors=_LANE_SERIES[row % len(_LANE_SERIES)],
                    edgecolors=_PAPER,
                    linewidth=0.3,
                )
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), [plain(name) for name in names])
            axes.set_xlim(0, excerpt.seconds * factor or 1)
            axes.set_title(
                f"{shortened(policy.name, 30)}: one pass, {unit}, {policy.kind}",
                loc="left",
                color=_INK,
            )
            axes.grid(axis="x", color=_GRID, linewidth=0.7)
    return done[0]


def memory(suite: SuiteResults) -> str:
    """Per tier and policy the bytes planned (outline), the peak used (bar) and the budget (line)."""
    tiers = [tier.tier for tier in suite.policies[0].tiers]
    count = len(suite.policies)
    with _figure(len(tiers) * (0.4 * count + 0.62) + 0.6, "memory") as (figure, done):
        for position, tier in enumerate(tiers):
            axes = _axes(figure, rows=len(tiers), position=position, legend_lines=3)
            uses = [p.tiers[position] for p in suite.policies]
            held = max([max(use.planned, use.peak) for use in uses] + [1])
            budgets = [use.budget for use in uses if use.budget is not None and use.budget <= 3 * held]
            top = max([held, *budgets])
            factor, unit = next(
                ((f, u) for f, u in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if top >= f), (1, "B")
            )
            for index, (policy, use) in enumerate(zip(suite.policies, uses, strict=True)):
                at = index + 0.2
                axes.barh(at, use.peak / factor, height=0.36, color=_color(index), linewidth=0)
                axes.barh(at, use.planned / factor, height=0.36, fill=False, edgecolor=_INK, linewidth=0.9)
                if use.budget is not None and use.budget <= top:
                    axes.plot([use.budget / factor] * 2, [at - 0.3, at + 0.3], color=_INK, linewidth=2.2)
                note = f"budget {format_bytes(use.budget)}" if use.budget is not None else "no budget"
                label = f"{shortened(policy.name, 26)}: {format_bytes(use.peak)}, {note}"
                axes.text(0, index - 0.2, label, va="center", color=_INK)
            axes.set_title(f"{tier} tier, {unit}, {kinds(suite)}", loc="left", color=_INK)
            axes.set_xlim(0, top / factor * 1.04)
            _bare(axes, count)
        _legend(
            figure,
            [("peak used", _MUTED, "s"), ("planned", _INK, "frame"), ("budget, where near", _INK, "|")],
        )
    return done[0]


def _lane_names(policies: Sequence[PolicyRun]) -> list[str]:
    found = dict.fromkeys(lane.lane for policy in policies for lane in policy.lanes)
    return [*(lane for lane in _LANES if lane in found), *(lane for lane in found if lane not in _LANES)]


def _color(index: int) -> str:
    return _SERIES[index % len(_SERIES)]


def _marker(index: int) -> str:
    return _MARKERS[(index + index // len(_SERIES)) % len(_MARKERS)]


@contextmanager
def _figure(height: float, name: str) -> Iterator[tuple[Figure, list[str]]]:
    """A figure of so many inches; its SVG is in the list when the context is left."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": f"tierbench-{name}", "text.parse_math": False,
        "font.family": "DejaVu Sans", "font.size": 8.2, "axes.titlesize": 8.6, "axes.labelsize": 8.2,
        "text.color": _INK, "axes.labelcolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED,
        "axes.edgecolor": _GRID, "axes.facecolor": "none", "figure.facecolor": "none", "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "xtick.labelsize": 7.8, "ytick.labelsize": 7.8, "xtick.major.size": 0, "ytick.major.size": 0,
    }  # fmt: skip
    done: list[str] = []
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's fonts have it
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasSVG(figure)
        yield figure, done
        raw = io.StringIO()
        figure.savefig(
            raw, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
        done.append(_finish(raw.getvalue(), name))


def _finish(svg: str, name: str) -> str:
    """Make matplotlib's SVG fit to stand in a page beside others: colours, names, no prolog."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r"((?:fill|stroke): ?)(#[0-9a-f]{6})",
        lambda match: (
            match[1] + (f"var(--tb-{_VARIABLES[match[2]]})" if match[2] in _VARIABLES else match[2])
        ),
        svg,
    )
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("'DejaVu Sans'", "'DejaVu Sans', system-ui, sans-serif")
    return svg.replace("<svg ", f'<svg class="tb" role="img" aria-labelledby="{name}-title" ', 1)


def _axes(
    figure: Figure, rows: int = 1, position: int = 0, left: float = 0.03, legend_lines: int = 0
) -> Axes:
    """One of ``rows`` panels above each other; room for a legend is left above them all."""
    height = figure.get_figheight()
    panel = (1 - (0.2 * legend_lines + 0.12 if legend_lines else 0) / height) / rows
    top, foot = (0.26 if rows > 1 else 0.06) / height, (0.28 if rows > 1 else 0.45) / height
    box = (left, panel * (rows - 1 - position) + foot, 0.97 - left, panel - top - foot)
    return figure.add_axes(box)


def _bare(axes: Axes, count: int) -> None:
    axes.set_ylim(count - 0.45, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(_few_ticks())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(axis="x", color=_GRID, linewidth=0.7)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5)


def _legend(figure: Figure, entries: Sequence[tuple[str, str, str]]) -> None:
    """A legend at the top, one line per entry: (label, colour, marker or "frame")."""
    share = 0.2 * len(entries) / figure.get_figheight()
    area = figure.add_axes((0, 1 - share, 1, share))
    area.set_axis_off()
    area.set_xlim(0, _WIDTH)
    area.set_ylim(len(entries) - 0.4, -0.6)
    for row, (label, color, marker) in enumerate(entries):
        fill = "none" if marker == "frame" else color
        area.plot(
            [0.2],
            [row],
            "s" if marker == "frame" else marker,
            color=color,
            markerfacecolor=fill,
            markersize=5.5,
        )
        area.text(0.36, row, shortened(label, 50), va="center", color=_INK)
