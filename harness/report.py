"""Writes the report of a suite: one Markdown file, one HTML page that stands alone, the pictures as SVG.

It knows which files there are and Markdown; what they say is in `report_sections`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.plot_base import STYLE
from harness.report_content import Cell, Content, Figure, Name, Table
from harness.report_data import read_suite
from harness.report_html import page
from harness.report_sections import make_content
from harness.report_text import html_text, markdown_code, markdown_text
from harness.store import write_atomically


@dataclass(frozen=True)
class Report:
    """Where a report is."""

    markdown: Path
    html: Path
    pictures: tuple[Path, ...]


def write_report(suite_dir: Path, output_dir: Path) -> Report:
    """Read a suite's folder and write its report.

    The same results give the same bytes. Only fixed names inside ``output_dir`` are written.

    Args:
        suite_dir: folder with table.json and policies/*/manifest.json (trace.json is optional).
        output_dir: folder of the report; made if it is not there.

    Raises:
        UsageError: if a file of the suite is missing or damaged.
        StorageError: if the report cannot be written.
    """
    content = make_content(read_suite(suite_dir))
    pictures = {f.file: _titled(f.draw(), f) for section in content.sections for f in section.figures}
    for name, svg in pictures.items():
        write_atomically(output_dir / name, _standing_alone(svg))
    write_atomically(output_dir / "report.md", markdown(content))
    write_atomically(output_dir / "report.html", page(content, pictures))
    return Report(
        output_dir / "report.md", output_dir / "report.html", tuple(output_dir / name for name in pictures)
    )


def markdown(content: Content) -> str:
    """The report as Markdown; pictures are linked, every table is written out."""
    lines = [f"# {markdown_text(content.title)}", "", *_table(Table("", ("", ""), content.facts, names=2))]
    for warning in content.warnings:
        lines += ["", f"> **Mind:** {markdown_text(warning)}"]
    for section in content.sections:
        lines += ["", f"## {markdown_text(section.title)}"]
        for paragraph in section.text:
            lines += ["", markdown_text(paragraph)]
        for figure in section.figures:
            lines += [
                "",
                f"![{markdown_text(figure.alt)}]({figure.file})",
                "",
                f"*{markdown_text(figure.caption)}*",
            ]
            lines += ["", *_table(figure.data)]
        for table in (*section.tables, *section.more):
            lines += ["", f"**{markdown_text(table.title)}**", "", *_table(table)]
    return "\n".join([*lines, ""])


def _table(table: Table) -> list[str]:
    rule = ["---" if i < table.names else "---:" for i in range(len(table.columns))]
    return [
        _row(map(_cell, table.columns)),
        _row(rule),
        *(_row(map(_cell, row)) for row in table.rows),
    ]


def _row(cells: Sequence[str] | map[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    return markdown_code(cell) if isinstance(cell, Name) else markdown_text(cell)


def _titled(svg: str, figure: Figure) -> str:
    """Put the words for those who cannot see it into a picture."""
    name = figure.file.removesuffix(".svg")
    head, separator, rest = svg.partition(">")
    return f'{head}{separator}<title id="{name}-title">{html_text(figure.alt)}</title>{rest}'


def _standing_alone(svg: str) -> str:
    """A picture as a file of its own, with its colours."""
    head, separator, rest = svg.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{separator}<style>{STYLE}</style>{rest}'
