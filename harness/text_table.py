"""Tables of text: Markdown that is also readable in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from harness.escape import plain

_PIPE = re.compile(r"(?<!\\)\|")


def markdown_table(rows: Iterable[Sequence[str]], left: int, *, padded: bool = True) -> list[str]:
    """The lines of a Markdown table; the first row is its head. What is not simply visible is replaced.

    Args:
        left: number of columns that are flush left; those after them are flush right.
        padded: whether all cells of a column are filled up to one width.
    """
    head, *body = ([_PIPE.sub(r"\\|", plain(cell)) for cell in row] for row in rows)
    widths = [max(map(len, column)) if padded else 3 for column in zip(head, *body, strict=True)]

    def line(row: Sequence[str]) -> str:
        if not padded:
            return f"| {' | '.join(row)} |"
        cells = zip(row, widths, strict=True)
        return f"| {' | '.join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells))} |"

    rule = ["-" * w if i < left else "-" * (w - padded) + ":" for i, w in enumerate(widths)]
    return [line(head), f"| {' | '.join(rule)} |", *map(line, body)]
