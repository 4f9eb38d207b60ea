"""Draws how many times faster ours is than other systems, with the spread over repeats.

It knows comparisons; colours and SVG are `harness.report.plots.style`'s matter.
"""

from __future__ import annotations

from harness.escape import shortened
from harness.report.analysis.systems import Systems
from harness.report.plots.style import GRID, INK, MUTED, PAPER, color_of, marker_of, panel_axes, picture


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
