"""Draws how many times faster ours is than other systems, with the spread over repeats.

It knows comparisons; colours and SVG are `harness.plot_base`'s matter.
"""

from __future__ import annotations

from harness.plot_base import GRID, INK, MUTED, color_of, marker_of, panel_axes, picture
from harness.report_systems import Systems
from harness.report_text import shortened


def ratios(one: Systems, suffix: str = "") -> str:
    """One line per system and setting; 1 is equal speed."""
    groups = list(dict.fromkeys(against.setting for against in one.ratios))
    lines = len(one.ratios) + 1.5 * len(groups)
    with picture(0.27 * lines + 0.65, f"ratios{suffix}") as (figure, done):
        axes = panel_axes(figure, left=0.04)
        low = min([0.8, *(a.low for a in one.ratios)]) / 1.3
        high = max([1.25, *(a.high for a in one.ratios)]) * 1.6
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.axvline(1, color=MUTED, linewidth=1.1)
        at = 0.0
        for index, setting in enumerate(groups):
            axes.text(low, at, shortened(setting, 54), va="center", color=INK, fontweight="bold")
            for against in (a for a in one.ratios if a.setting == setting):
                at += 1
                color = color_of(index)
                axes.plot([against.low, against.high], [at, at], color=color, linewidth=1.8)
                axes.plot([against.middle], [at], marker_of(index), color=color, markersize=5.5)
                label = f"{shortened(against.theirs.name, 34)}  {against.middle:.2f}×"
                axes.text(low, at - 0.34, label, va="center", color=MUTED, fontsize=7)
            at += 1.5
        axes.set_ylim(at - 0.6, -0.9)
        axes.set_yticks([])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel(f"ours / theirs, generated token/s, {one.kind}")
        axes.grid(axis="x", color=GRID, linewidth=0.6)
    return done[0]
