"""Puts names beside the points of a panel so that they cover neither points nor each other.

It knows matplotlib and nothing of what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox

_NEAR, _STEP, _ROUNDS = 7.0, 5.0, 14
"""Distance of a name from its point in points, and how often it may be moved further away."""

_LEADER_FROM = 14.0
"""Distance from which a thin line leads from a point to its name."""


def place_labels(figure: Figure, axes: Axes, names: Sequence[str], color: str, leader: str) -> None:
    """Name the points of ``axes``: single markers that were plotted in the order of ``names``.

    A name is put where it overlaps no point, interval, line or earlier name, as near as possible; if there is
    no such place, where the last try was. A thin line in the colour ``leader`` leads to one that is far away.
    """
    from matplotlib.text import Text

    markers = _markers(axes)[: len(names)]
    if not markers:
        return
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    area = axes.get_window_extent(renderer)
    taken = [line.get_window_extent(renderer).padded(2) for line in axes.lines if not _spans(line)]
    for marker, name in zip(markers, names, strict=True):
        at = (marker.get_xdata()[0], marker.get_ydata()[0])  # type: ignore[index]
        text = axes.annotate(
            name, at, xytext=(0, 0), textcoords="offset points", color=color, fontsize=7.6,
            arrowprops={"arrowstyle": "-", "color": leader, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
            bbox={"facecolor": axes.get_facecolor(), "alpha": 0.7, "linewidth": 0, "pad": 0.6}, zorder=4,
        )  # fmt: skip
        for x, y, across, along in _places():
            text.set(position=(x, y), ha=across, va=along)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(1)  # the name alone, without its line
            if _inside(box, area) and not any(box.overlaps(other) for other in taken):
                break
        if max(abs(text.get_position()[0]), abs(text.get_position()[1])) < _LEADER_FROM and text.arrow_patch:
            text.arrow_patch.set_visible(False)
        taken.append(box)


def _markers(axes: Axes) -> list[Line2D]:
    """Lines that are one marker, without the rings around some."""
    single = [line for line in axes.lines if len(line.get_xdata()) == 1]  # type: ignore[arg-type]
    return [line for line in single if line.get_markersize() < 10]


def _spans(line: Line2D) -> bool:
    """Whether it is a line across the whole panel, which names may lie on."""
    return line.get_linestyle() == "-" and len(set(line.get_ydata())) == 1  # type: ignore[arg-type]


def _places() -> Iterator[tuple[float, float, str, str]]:
    """Offsets in points with alignments, the nearest first."""
    for turn in range(_ROUNDS):
        far = _NEAR + _STEP * turn
        yield far, 0, "left", "center"
        yield -far, 0, "right", "center"
        yield 0, far, "center", "bottom"
        yield 0, -far, "center", "top"
        yield far, far, "left", "bottom"
        yield -far, -far, "right", "top"
        yield far, -far, "left", "top"
        yield -far, far, "right", "bottom"


def _inside(box: Bbox, area: Bbox) -> bool:
    return bool(area.x0 <= box.x0 and box.x1 <= area.x1 and area.y0 <= box.y0 and box.y1 <= area.y1)
