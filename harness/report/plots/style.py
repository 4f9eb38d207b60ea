"""What all pictures of the report share: colours for light and dark, axes, a legend, SVG that fits a page.

It knows matplotlib and SVG, and nothing of what is drawn. In SVG colours are CSS variables, so that a
picture follows the page (or, in a file of its own, the reader) from light to dark; print and PNG are light.
Texts from data are drawn literally (no mathematics, no markup), and the same data give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.files.whole import write_whole
from harness.escape import html_text, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib draws with the light colours; in SVG each becomes a CSS variable. Two sets of series colours,
# one per background, after Okabe and Ito (told apart by all common kinds of colour vision).
INK, MUTED, GRID, PAPER = "#1b1f24", "#59636e", "#d5dae0", "#ffffff"
_LIGHT = ("#0072b2", "#d55e00", "#00805e", "#b0568c", "#8c6d00", "#5a6472")
_DARK = ("#56b4e9", "#ff8f4a", "#35c89b", "#e795c6", "#e3c23c", "#a7b0bd")
STREAM_SERIES = ("#3f4a58", "#b0568c", "#8c6d00", "#217a8e")
_STREAM_DARK = ("#c9d0d9", "#e795c6", "#e3c23c", "#6fc7d9")
_MARKERS = "osD^vP"


def _variables(
    ink: str, muted: str, grid: str, paper: str, series: Sequence[str], streams: Sequence[str]
) -> str:
    named = {"ink": ink, "muted": muted, "grid": grid, "paper": paper}
    named |= {str(index): color for index, color in enumerate(series)}
    named |= {f"stream{index}": color for index, color in enumerate(streams)}
    return "svg.tb{" + "".join(f"--tb-{name}:{color};" for name, color in named.items()) + "}"


STYLE = (
    _variables(INK, MUTED, GRID, PAPER, _LIGHT, STREAM_SERIES)
    + "@media screen and (prefers-color-scheme:dark){"
    + _variables("#e6e9ee", "#a3adb9", "#3a424d", "#14171c", _DARK, _STREAM_DARK)
    + "}"
)
"""The style sheet that the pictures need, in a page or in a file of their own."""

_VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper",
    **{color: f"stream{index}" for index, color in enumerate(STREAM_SERIES)},
    **{color: str(index) for index, color in enumerate(_LIGHT)},
}  # fmt: skip

WIDTH = 4.0  # inches; 384 CSS pixels, so that the letters stay readable on a narrow screen
_DPI = 160


def color_of(index: int) -> str:
    """The colour of a series."""
    return _LIGHT[index % len(_LIGHT)]


def marker_of(index: int) -> str:
    """The marker of a series."""
    return _MARKERS[(index + index // len(_LIGHT)) % len(_MARKERS)]


_CHIPS = {
    "o": '<circle cx="5" cy="5" r="4.6"/>',
    "s": '<rect x=".8" y=".8" width="8.4" height="8.4"/>',
    "D": '<path d="M5 0 10 5 5 10 0 5Z"/>',
    "^": '<path d="M5 .4 10 9.4H0Z"/>',
    "v": '<path d="M5 9.6 10 .6H0Z"/>',
    "P": '<path d="M3.4 0h3.2v3.4H10v3.2H6.6V10H3.4V6.6H0V3.4h3.4Z"/>',
}


def chip(index: int) -> str:
    """A series' marker as a small picture to stand before its name."""
    shape = _CHIPS[marker_of(index)]
    color = f"var(--tb-{index % len(_LIGHT)})"
    return f'<svg class="tb chip" viewBox="0 0 10 10" aria-hidden="true" style="fill:{color}">{shape}</svg>'


@contextmanager
def picture(
    height: float, name: str, width: float = WIDTH, png: Path | None = None
) -> Iterator[tuple[Figure, list[str]]]:
    """A figure of this size in inches; its SVG is in the list when the context is left.

    Args:
        png: where it is written as PNG, too.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": f"tierbench-{name}", "text.parse_math": False,
        "font.family": "DejaVu Sans", "font.size": 8.2, "axes.titlesize": 8.6, "axes.labelsize": 8.2,
        "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
        "axes.edgecolor": GRID, "axes.facecolor": "none", "figure.facecolor": "none", "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "xtick.labelsize": 7.8, "ytick.labelsize": 7.8, "xtick.major.size": 0, "ytick.major.size": 0,
    }  # fmt: skip
    done: list[str] = []
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's fonts have it
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)  # measures texts where labels are placed
        yield figure, done
        raw = io.StringIO()
        figure.savefig(
            raw, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
        done.append(_finish(raw.getvalue(), name))
        if png is not None:
            pixels = io.BytesIO()
            figure.savefig(pixels, format="png", dpi=_DPI, facecolor=PAPER, metadata={"Software": None})
            write_whole(png, pixels.getvalue())


def titled(svg: str, name: str, alt: str) -> str:
    """Put the words for those who cannot see it into a picture."""
    head, separator, rest = svg.partition(">")
    return f'{head}{separator}<title id="{name}-title">{html_text(alt)}</title>{rest}'


def standing_alone(svg: str) -> str:
    """A picture as a file of its own, with its colours."""
    head, separator, rest = svg.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{separator}<style>{STYLE}</style>{rest}'


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


def panel_axes(
    figure: Figure,
    rows: int = 1,
    position: int = 0,
    left: float = 0.03,
    legend_lines: int = 0,
    right: float = 0.97,
) -> Axes:
    """One of ``rows`` panels above each other; space for a legend is left above them all."""
    height = figure.get_figheight()
    panel = (1 - (0.2 * legend_lines + 0.12 if legend_lines else 0) / height) / rows
    top, foot = (0.26 if rows > 1 else 0.06) / height, (0.28 if rows > 1 else 0.45) / height
    box = (left, panel * (rows - 1 - position) + foot, right - left, panel - top - foot)
    axes = figure.add_axes(box)
    axes.set_facecolor(PAPER)  # names of points lie on it, half transparent
    return axes


def upright(axes: Axes, at: float, low: float, high: float, color: str) -> None:
    """An interval as an upright line."""
    axes.plot([at, at], [low, high], color=color, linewidth=1.3, alpha=0.6, solid_capstyle="butt")


def bare(axes: Axes, count: int) -> None:
    """Horizontal bars: as many rows, few ticks, no labels at the side."""
    axes.set_ylim(count - 0.45, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(few_ticks())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(axis="x", color=GRID, linewidth=0.7)


def few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=5)


def legend(figure: Figure, entries: Sequence[tuple[str, str, str]]) -> None:
    """A legend at the top, one line per entry: (label, colour, marker, "frame" or "ring")."""
    share = 0.2 * len(entries) / figure.get_figheight()
    area = figure.add_axes((0, 1 - share, 1, share))
    area.set_axis_off()
    area.set_xlim(0, figure.get_figwidth())
    area.set_ylim(len(entries) - 0.4, -0.6)
    for row, (label, color, marker) in enumerate(entries):
        shape = {"frame": "s", "ring": "o"}.get(marker, marker)
        fill = color if shape == marker else "none"
        area.plot([0.2], [row], shape, color=color, markerfacecolor=fill, markersize=5.5)
        area.text(0.36, row, shortened(label, 50), va="center", color=INK)
