"""Boxes, arrows and texts as an SVG file: the same input gives the same bytes, and no font comes along."""

from __future__ import annotations

from html import escape

BLUE, ORANGE, GREEN, GREY, LIGHT = "#2f6db3", "#d9822b", "#3f8f5b", "#5b6570", "#eceff2"
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Drawing:
    """A white page of a fixed size; coordinates are in pixels from its upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="{FONT}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{GREY}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        radius: float = 1,
        stroke: str = "none",
    ) -> None:
        """A filled rectangle."""
        self._lines.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.2):.1f}" height="{height:.1f}" '
            f'rx="{radius}" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        anchor: str = "start",
        fill: str = "#1b1f24",
        weight: str = "normal",
    ) -> None:
        """A line of text whose base line is at y."""
        self._lines.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" '
            f'font-weight="{weight}">{escape(text)}</text>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A straight arrow."""
        self._lines.append(
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{GREY}" '
            'stroke-width="2" marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """The whole file."""
        return "\n".join([*self._lines, "</svg>", ""])
