"""Reads tables of the paper that were run again here, to stand beside ours.

It knows ``results/paper/*.json``: one table each, ``{"title", "source", "columns": [...], "rows": [[...]]}``,
with numbers as numbers. What is not there makes no section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.report_content import MISSING, Cell, Number, Section, Table
from harness.report_file import Document


@dataclass(frozen=True)
class Published:
    """One table with its source."""

    source: str
    table: Table


def read_published(folder: Path) -> list[Published]:
    """Every table in a folder, by file name.

    Raises:
        UsageError: if a file is damaged.
    """
    return [_read(path) for path in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def _read(path: Path) -> Published:
    stored = Document.read(path)
    title = stored.maybe("title", stored.text) or path.stem
    content = stored.content if isinstance(stored.content, dict) else {}
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows:
        raise stored.damage("rows", "is not a list of rows")
    columns = content.get("columns") or (list(rows[0]) if isinstance(rows[0], dict) else None)
    if not isinstance(columns, list):
        raise stored.damage("columns", "is missing")
    cells = []
    for index, row in enumerate(rows):
        values = [row.get(key) for key in columns] if isinstance(row, dict) else row
        if not isinstance(values, list) or len(values) != len(columns):
            raise stored.damage(f"rows[{index}]", f"has not {len(columns)} cells")
        cells.append(tuple(map(_cell, values)))
    numeric = [any(isinstance(row[place], Number) for row in cells) for place in range(len(columns))]
    texts = numeric.index(True) if True in numeric else len(columns)
    source = stored.maybe("source", stored.text) or ""
    return Published(
        source, Table(title, tuple(str(c).replace("_", " ") for c in columns), tuple(cells), texts)
    )


def _cell(value: object) -> Cell:
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return Number(f"{value:,}" if isinstance(value, int) else f"{value:,.4g}", float(value))


def section(found: Sequence[Published]) -> tuple[Section, ...]:
    """The tables, with where their published figures come from."""
    if not found:
        return ()
    sources = dict.fromkeys(one.source for one in found if one.source)
    text = "Published figures are those of the paper, on its hardware; ours say how they were come by."
    return (
        Section("The paper's tables beside ours", (text, *sources), tables=tuple(p.table for p in found)),
    )
