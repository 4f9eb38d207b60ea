"""Draws the pictures of a suite's report with matplotlib: bars, intervals, timelines.

It knows suites and what is drawn of them; colours and SVG are `harness.report.plots.style`'s matter.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.units import GIB, KIB, MIB, format_bytes
from harness.escape import plain, shortened
from harness.report.analysis.findings import Findings
from harness.report.content import per_second, size
from harness.report.inputs.data import PolicyResult, Result
from harness.report.plots.style import (
    GRID,
    INK,
    MUTED,
    PAPER,
    STREAM_SERIES,
    bare,
    color_of,
    legend,
    marker_of,
    panel_axes,
    picture,
)

_STREAMS = ("compute", "weights", "kv_in", "kv_out")


def accuracy(suite: Findings) -> str:
    """Per run entry and policy the accuracy with its 95 % interval, and the mean over run entries."""
    groups: list[tuple[str, list[tuple[int, float, float | None, float | None]]]] = []
    for entry in suite.run_entries:
        found = [(i, suite.result(entry, p.name)) for i, p in enumerate(suite.policies)]
        points = [_point(i, result) for i, result in found if result is not None and result.is_accuracy]
        if points:
            groups.append((entry, points))
    means = [(i, suite.means.get(p.name)) for i, p in enumerate(suite.policies)]
    shown = [(i, mean.value, mean.low, mean.high) for i, mean in means if mean is not None]
    if shown and len(suite.compared) > 1:
        groups.append((f"mean of {len(suite.compared)} run entries", shown))
    lines = sum(len(points) + 1.6 for _, points in groups)
    names = [p.name for p in suite.policies]
    with picture(0.19 * lines + 0.2 * len(names) + 0.75, "accuracy") as (figure, done):
        axes = panel_axes(figure, legend_lines=len(names))
        at = 0.0
        for title, points in groups:
            axes.text(0, at, shortened(title, 54), va="center", ha="left", color=INK)
            for index, value, low, high in points:
                at += 1
                color = color_of(index)
                if low is not None and high is not None:
                    axes.plot([low, high], [at, at], color=color, linewidth=1.6, solid_capstyle="butt")
                axes.plot([value], [at], marker_of(index), color=color, markersize=5, clip_on=False)
            at += 1.6
        axes.set_ylim(at - 0.8, -0.9)
        axes.set_xlim(0, 1)
        axes.set_yticks([])
        axes.set_xlabel(f"accuracy with 95 % interval, {suite.kinds}")
        axes.grid(axis="x", color=GRID, linewidth=0.7)
        legend(figure, [(name, color_of(i), marker_of(i)) for i, name in enumerate(names)])
    return done[0]


def _point(index: int, result: Result) -> tuple[int, float, float | None, float | None]:
    assert result.value is not None
    return index, result.value, result.low, result.high


def throughput(suite: Findings) -> str:
    """Generated and total token/s per policy, as bars from zero."""
    panels = [
        (f"generated token/s, {suite.kinds}", [p.generated_per_second for p in suite.policies]),
        (f"prompt and generated token/s, {suite.kinds}", [p.total_per_second for p in suite.policies]),
    ]
    count = len(suite.policies)
    with picture(2 * (0.4 * count + 0.75), "throughput") as (figure, done):
        for position, (title, rates) in enumerate(panels):
            axes = panel_axes(figure, rows=2, position=position)
            top = max([rate for rate in rates if rate is not None], default=1.0) or 1.0
            for index, (policy, rate) in enumerate(zip(suite.policies, rates, strict=True)):
                axes.barh(index + 0.2, rate or 0, height=0.36, color=color_of(index), linewidth=0)
                value = "not measured" if rate is None else per_second(rate)
                axes.text(0, index - 0.2, shortened(policy.name, 44), va="center", color=INK)
                axes.text((rate or 0) + top * 0.015, index + 0.2, value, va="center", color=INK)
            axes.set_title(title, loc="left", color=INK)
            axes.set_xlim(0, top * 1.2)
            bare(axes, count)
    return done[0]


def streams(suite: Findings) -> str:
    """Busy share of every stream, a group of bars per policy."""
    names = _stream_names(suite.policies)
    lines = sum(len(p.streams) + 1.5 for p in suite.policies)
    with picture(0.2 * lines + 0.65, "streams") as (figure, done):
        axes = panel_axes(figure)
        top = max([stream.share for p in suite.policies for stream in p.streams.values()] + [1.0])
        at = 0.0
        for policy in suite.policies:
            axes.text(0, at, shortened(policy.name, 54), va="center", color=INK)
            for name, stream in policy.streams.items():
                at += 1
                color = STREAM_SERIES[names.index(name) % len(STREAM_SERIES)]
                axes.barh(at, stream.share, height=0.66, color=color, linewidth=0)
                label = f"{plain(name)} {stream.share:.2f}"
                axes.text(stream.share + 0.012, at, label, va="center", color=INK)
            at += 1.5
        axes.set_ylim(at - 0.7, -0.9)
        axes.set_xlim(0, top * 1.24)
        axes.set_yticks([])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel(f"busy seconds / seconds of all passes, {suite.kinds}")
        axes.grid(axis="x", color=GRID, linewidth=0.7)
    return done[0]


def timeline(suite: Findings) -> str:
    """One pass of every policy that has a trace: which stream worked when."""
    policies = [p for p in suite.policies if p.excerpt is not None]
    names = _stream_names(policies)
    with picture(len(policies) * (0.2 * len(names) + 0.72), "timeline") as (figure, done):
        for position, policy in enumerate(policies):
            excerpt = policy.excerpt
            assert excerpt is not None
            axes = panel_axes(figure, rows=len(policies), position=position, left=0.15)
            factor, unit = (1e3, "ms") if excerpt.seconds < 1 else (1.0, "s")
            for row, stream in enumerate(names):
                spans = [s for s in excerpt.spans if s.stream == stream]
                bars = [(s.begin * factor, (s.end - s.begin) * factor) for s in spans]
                color = STREAM_SERIES[row % len(STREAM_SERIES)]
                axes.broken_barh(bars, (row - 0.38, 0.76), facecolors=color, edgecolors=PAPER, linewidth=0.3)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), [plain(name) for name in names])
            axes.set_xlim(0, excerpt.seconds * factor or 1)
            title = f"{shortened(policy.name, 30)}: one pass, {unit}, {policy.kind}"
            axes.set_title(title, loc="left", color=INK)
            axes.grid(axis="x", color=GRID, linewidth=0.7)
    return done[0]


def memory(suite: Findings) -> str:
    """Per tier and policy the bytes planned (outline), the peak used (bar) and the budget (line)."""
    tiers = list(suite.policies[0].tiers)
    count = len(suite.policies)
    with picture(len(tiers) * (0.4 * count + 0.62) + 0.6, "memory") as (figure, done):
        for position, tier in enumerate(tiers):
            axes = panel_axes(figure, rows=len(tiers), position=position, legend_lines=3)
            uses = [p.tiers[tier] for p in suite.policies]
            most = max([1, *(count for use in uses for count in (use.planned, use.peak))])
            budgets = [use.budget for use in uses if use.budget is not None and use.budget <= 3 * most]
            top = max([most, *budgets])
            factor, unit = next(
                ((f, u) for f, u in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if top >= f), (1, "B")
            )
            for index, (policy, use) in enumerate(zip(suite.policies, uses, strict=True)):
                at = index + 0.2
                axes.barh(at, use.peak / factor, height=0.36, color=color_of(index), linewidth=0)
                planned = use.planned / factor
                axes.barh(at, planned, height=0.36, fill=False, edgecolor=INK, linewidth=0.9)
                if use.budget is not None and use.budget <= top:
                    axes.plot([use.budget / factor] * 2, [at - 0.3, at + 0.3], color=INK, linewidth=2.2)
                note = f"budget {format_bytes(use.budget)}" if use.budget is not None else "no budget"
                label = f"{shortened(policy.name, 26)}: {size(use.peak)}, {note}"
                axes.text(0, index - 0.2, label, va="center", color=INK)
            axes.set_title(f"{tier} tier, {unit}, {suite.kinds}", loc="left", color=INK)
            axes.set_xlim(0, top / factor * 1.04)
            bare(axes, count)
        legend(
            figure, [("peak used", MUTED, "s"), ("planned", INK, "frame"), ("budget, where near", INK, "|")]
        )
    return done[0]


def _stream_names(policies: Sequence[PolicyResult]) -> list[str]:
    found = dict.fromkeys(stream for policy in policies for stream in policy.streams)
    return [
        *(stream for stream in _STREAMS if stream in found),
        *(stream for stream in found if stream not in _STREAMS),
    ]
