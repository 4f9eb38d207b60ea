"""Draws points: speed against accuracy, latency against throughput, paired differences, ratios of systems.

It knows standings, paired comparisons and comparisons of systems; colours and SVG are the matter of
`harness.report.plots.style`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from harness.escape import shortened
from harness.report.analysis.findings import Findings
from harness.report.analysis.frontier import Standing
from harness.report.analysis.pairs import ALL, Paired
from harness.report.analysis.systems import Systems
from harness.report.content import Mean
from harness.report.plots.labels import place_labels
from harness.report.plots.style import (
    GRID,
    INK,
    MUTED,
    PAPER,
    color_of,
    few_ticks,
    marker_of,
    panel_axes,
    picture,
    upright,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def frontier(suite: Findings, found: Sequence[Standing]) -> str:
    """Throughput against accuracy; the frontier as a line, dominated policies grey."""
    shown = [(s, s.rate, s.accuracy) for s in found if s.rate and s.accuracy]
    with picture(3.1, "frontier") as (figure, done):
        axes = panel_axes(figure, left=0.13)
        best = sorted((rate, mean.value) for s, rate, mean in shown if s.dominated_by is None)
        if len(best) > 1:  # a single marker would be taken for a policy's
            axes.step(*zip(*best, strict=True), where="pre", color=INK, linewidth=1, alpha=0.55, zorder=1)
        axes.set_ylabel("mean accuracy, 95 % interval")
        _policies(figure, axes, suite, shown)
    return done[0]


def latency(suite: Findings, found: Sequence[Standing]) -> str:
    """Median seconds of a request in the block, up to the 95th percentile, against throughput."""
    shown = [
        (replace(s, dominated_by=None), s.rate, Mean(s.latency, s.latency, s.slow_latency))
        for s in found
        if s.rate and s.latency is not None and s.slow_latency is not None
    ]
    with picture(3.1, "latency") as (figure, done):
        axes = panel_axes(figure, left=0.13)
        axes.set_ylim(0, 1.12 * max(mean.high or 0.0 for _, _, mean in shown) or 1)
        axes.set_ylabel("seconds in the block: median, line to the 95th percentile", fontsize=7.4)
        _policies(figure, axes, suite, shown)
    return done[0]


def _policies(
    figure: Figure, axes: Axes, suite: Findings, shown: Sequence[tuple[Standing, float, Mean]]
) -> None:
    """Markers with upright intervals over throughput; dominated policies are grey."""
    colors = [MUTED if s.dominated_by else color_of(s.index) for s, _, _ in shown]
    for (_, rate, mean), color in zip(shown, colors, strict=True):
        if mean.low is not None and mean.high is not None:
            upright(axes, rate, mean.low, mean.high, color)
    for (s, rate, mean), color in zip(shown, colors, strict=True):
        axes.plot([rate], [mean.value], marker_of(s.index), color=color, markersize=6.5)
    _rates(axes, [rate for _, rate, _ in shown])
    axes.set_xlabel(f"prompt and generated token/s, {suite.kinds}")
    axes.grid(color=GRID, linewidth=0.6)
    place_labels(figure, axes, [shortened(s.policy, 26) for s, _, _ in shown], INK, MUTED)


def _rates(axes: Axes, rates: Sequence[float]) -> None:
    low, high = min(rates), max(rates)
    if high > 8 * low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.6, high * 1.6)
    else:
        axes.set_xlim(0, high * 1.18)
        axes.xaxis.set_major_locator(few_ticks())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def differences(suite: Findings, found: Sequence[Paired]) -> str:
    """Difference of accuracy with its interval, per comparison; a bar shows the minimum detectable effect."""
    names = [policy.name for policy in suite.policies]
    groups: dict[str, list[Paired]] = {}
    for paired in found:
        groups.setdefault(paired.entry, []).append(paired)
    lines = sum(len(group) + 1.5 for group in groups.values())
    with picture(0.2 * lines + 0.65, "differences") as (figure, done):
        axes = panel_axes(figure)
        reach = max([0.02, *(max(abs(p.change.low), abs(p.change.high)) for p in found)]) * 1.06
        axes.set_xlim(-reach, reach)
        axes.axvline(0, color=MUTED, linewidth=1)
        at = 0.0
        for entry, group in groups.items():
            title = "all run entries with an accuracy" if entry == ALL else shortened(entry, 54)
            axes.text(-reach, at, title, va="center", ha="left", color=INK)
            for paired in group:
                at += 1
                change, index = paired.change, names.index(paired.right)
                d = min(change.detectable, reach)
                axes.barh(at, 2 * d, left=-d, height=0.62, color=GRID, linewidth=0, alpha=0.55)
                axes.plot([change.low, change.high], [at, at], color=color_of(index), linewidth=1.6)
                face = color_of(index) if paired.significant else PAPER
                axes.plot(
                    [change.value], [at], marker_of(index), color=color_of(index), markerfacecolor=face,
                    markersize=5.5,
                )  # fmt: skip
            at += 1.5
        axes.set_ylim(at - 0.7, -0.9)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(few_ticks())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.2g}".replace("-", "−") if value else "0")
        axes.set_xlabel(f"accuracy against {shortened(found[0].left, 26)}, {suite.kinds}")
        axes.grid(axis="x", color=GRID, linewidth=0.6)
    return done[0]


def ratios(one: Systems, suffix: str = "") -> str:
    """One line per system and setting; 1 is equal speed."""
    groups = list(dict.fromkeys(against.setting for against in one.ratios))
    lines = 1.9 * len(one.ratios) + 1.6 * len(groups)
    behind = {"facecolor": PAPER, "linewidth": 0, "pad": 1.2}
    with picture(0.2 * lines + 0.6, f"ratios{suffix}") as (figure, done):
        axes = panel_axes(figure, left=0.03)
        low = min([0.8, *(a.ratio.least for a in one.ratios)]) / 1.3
        high = max([1.25, *(a.ratio.most for a in one.ratios)]) * 1.5
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.axvline(1, color=MUTED, linewidth=1.1)
        at = 0.0
        for index, setting in enumerate(groups):
            title = shortened(setting, 54)
            axes.text(low, at, title, va="center", color=INK, fontweight="bold", bbox=behind)
            at += 1.1
            for against in (a for a in one.ratios if a.setting == setting):
                label = f"{shortened(against.theirs.name, 34)}: {against.ratio.median:.2f}×"
                axes.text(low, at, label, va="center", color=INK, bbox=behind)
                at += 0.9
                color = color_of(index)
                axes.plot([against.ratio.least, against.ratio.most], [at, at], color=color, linewidth=2)
                axes.plot([against.ratio.median], [at], marker_of(index), color=color, markersize=6)
                at += 1.0
            at += 0.5
        axes.set_ylim(at - 0.9, -0.8)
        axes.set_yticks([])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.tick_params(which="minor", size=0)
        axes.set_xlabel("ours / theirs, generated token/s, measured")
        axes.grid(axis="x", color=GRID, linewidth=0.6)
    return done[0]
