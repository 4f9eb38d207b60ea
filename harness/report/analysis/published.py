"""Reads tables of the paper that were run again here, to set beside ours.

It knows ``results/paper/*.json``: ``{"title", "source", "kind", "columns": [...], "rows": [[...]]}`` with
numbers as numbers; rows may be objects, and those that name their ``table`` are one table for each. What is
not there makes no section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.report.content import MISSING, Cell, Number, Section, Table
from harness.report.inputs.json_file import Document


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
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [published for path in paths for published in _read(path)]


def _read(path: Path) -> list[Published]:
    stored = Document.read(path)
    title = stored.maybe("title", stored.text) or path.stem
    source, kind = stored.maybe("source", stored.text) or "", stored.maybe("kind", stored.text)
    content = stored.content if isinstance(stored.content, dict) else {}
    rows = content.get("rows")
    if not isinstance(rows, list) or not rows:
        raise stored.damage("rows", "is not a list of rows")
    said = f" ({kind})" if kind else ""
    if all(isinstance(row, dict) for row in rows):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(str(row.get("table", title)), []).append(row)
        return [
            Published(source, _objects(f"{name.replace('_', ' ')}{said if _has_ours(group) else ''}", group))
            for name, group in groups.items()
        ]
    columns = content.get("columns")
    if not isinstance(columns, list):
        raise stored.damage("columns", "is missing")
    for index, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(columns):
            raise stored.damage(f"rows[{index}]", f"has not {len(columns)} cells")
    return [Published(source, _table(f"{title}{said}", columns, rows))]


_MOST_ROWS = 15
"""Longer tables are folded."""

_ASIDE = ("table", "source", "note", "setting")
"""Fields of rows that would fill a page and are in the file."""


def _has_ours(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any row holds a figure beside the published one."""
    return any(row.get("simulated") is not None or row.get("measured") is not None for row in rows)


def _objects(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows that are objects: their fields are columns, those that are empty in all are left out."""
    keys = dict.fromkeys(key for row in rows for key in row if key not in _ASIDE)
    columns = [key for key in keys if any(row.get(key) not in (None, "") for row in rows)]
    return _table(title, columns, [[row.get(key) for key in columns] for row in rows])


def _table(title: str, columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Table:
    cells = tuple(tuple(map(_cell, row)) for row in rows)
    numeric = [any(isinstance(row[place], Number) for row in cells) for place in range(len(columns))]
    names = numeric.index(True) if True in numeric else len(columns)
    return Table(title, tuple(str(column).replace("_", " ") for column in columns), cells, names)


def _cell(value: object) -> Cell:
    if value is None or value == "":
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return Number(f"{value:,}" if isinstance(value, int) else f"{value:,.4g}", float(value))


def section(found: Sequence[Published]) -> tuple[Section, ...]:
    """The tables, with where their published figures come from."""
    if not found:
        return ()
    sources = dict.fromkeys(one.source for one in found if one.source)
    text = "Published figures are those of the paper, on its hardware; ours are marked measured or simulated."
    tables = [one.table for one in found]
    return (
        Section(
            "The paper's tables beside ours",
            (text, *sources),
            tables=tuple(table for table in tables if len(table.rows) <= _MOST_ROWS),
            more=tuple(table for table in tables if len(table.rows) > _MOST_ROWS),
        ),
    )
