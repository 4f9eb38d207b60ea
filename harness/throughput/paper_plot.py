"""The picture of the paper's 18 cells: published, simulated, planned."""

from __future__ import annotations

import io
from collections.abc import Sequence

from harness.throughput.paper import PaperRow, is_cell

_COLORS = {"published": "0.55", "FlexGen simulated": "#4477aa", "planner, simulated": "#cc6633"}


def draw(rows: Sequence[PaperRow], profile: str) -> str:
    """One panel per model, a group of bars per cell, on a logarithmic scale; as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    cells = [row for row in rows if is_cell(row)]
    models = list(dict.fromkeys(row.model for row in cells))
    figure, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4.2), squeeze=False)
    for panel, model in zip(axes[0], models, strict=True):
        part = [row for row in cells if row.model == model]
        series = {
            "published": [row.published for row in part],
            "FlexGen simulated": [row.simulated for row in part],
            "planner, simulated": [row.planned for row in part],
        }
        shown = {name: values for name, values in series.items() if any(values)}
        for index, (name, values) in enumerate(shown.items()):
            places = [place + (index - (len(shown) - 1) / 2) * 0.27 for place in range(len(part))]
            bars = [value or float("nan") for value in values]
            panel.bar(places, bars, width=0.25, color=_COLORS[name], label=name)
        packed = [" 4 bits" if row.system == "flexgen-compressed" else "" for row in part]
        labels = [f"{row.prompt}{bits}" for row, bits in zip(part, packed, strict=True)]
        panel.set_xticks(range(len(part)), labels, rotation=30, ha="right")
        panel.set_yscale("log")
        heights = [value for values in shown.values() for value in values if value]
        panel.set_ylim(0.6 * min(heights), 1.5 * max(heights))
        for axis_formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))
        panel.tick_params(axis="y", which="both", labelsize=8)
        panel.set_title(model.upper())
        panel.set_xlabel("prompt tokens, 32 generated")
        panel.grid(axis="y", which="both", alpha=0.25)
    axes[0][0].set_ylabel("generation throughput, token/s")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=len(names), frameon=False)
    figure.text(0.995, 0.01, f"profile {profile}; nothing fitted to these figures", ha="right", fontsize=8)
    figure.tight_layout(rect=(0, 0.02, 1, 0.93))
    with matplotlib.rc_context({"svg.hashsalt": "tierbench"}):  # the same bytes each time
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return drawn.getvalue()
