"""Writes a report's content as one HTML page: works from disk, loads nothing, readable in light and dark.

It knows how single values become HTML; the page's outline, style and script are files of
``harness/report/assets``. Jinja escapes every value, which is made `plain` before, unless it is `Markup`
from here. The page's one script sorts tables; its policy allows no other, by digest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from harness.escape import html_block, plain, shortened
from harness.report.content import Cell, Content, Name, Number
from harness.report.plots.style import STYLE, chip

_ASSETS = Path(__file__).resolve().parent / "assets"
_PROSE = 60
"""Characters from which on a cell's text is read as a sentence, and may wrap."""

_MOST_COMPARED = 2_000


def page(content: Content, pictures: Mapping[str, str]) -> str:
    """The whole page; ``pictures`` are SVG texts by file name."""
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().from_string(_asset("report.html.j2")).render(
        content=content, digest=digest, script=Markup(script), style=Markup(_asset("report.css") + STYLE),
        svg=lambda figure: Markup(pictures[figure.file]), marked=_marked,
    )  # fmt: skip


@cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _environment() -> Environment:
    made = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(str(value)),
    )  # fmt: skip
    made.filters |= {
        "inline": _inline,
        "block": lambda text: Markup(html_block(text)),
        "shortened": shortened,
        "anchor": lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"),
    }
    made.tests |= {
        "number": lambda cell: isinstance(cell, Number),
        "prose": lambda cell: not isinstance(cell, Name) and len(cell) > _PROSE,
    }
    return made


def _inline(cell: Cell) -> Markup:
    """A name may be broken after its own signs, such as underscores, where a column is narrow."""
    text = escape(plain(cell))
    if not isinstance(cell, Name):
        return text
    code = Markup("<code>" + re.sub(r"([_:,=/-]+)", r"\1<wbr>", str(text)) + "</code>")
    return code if cell.mark is None else Markup(f'<span class="policy">{chip(cell.mark)}{code}</span>')


def _marked(left: str, right: str) -> tuple[Markup, Markup]:
    """Two answers with the words that differ marked; very long ones are shown as they are."""
    if max(len(left), len(right)) > _MOST_COMPARED:
        return Markup(html_block(left)), Markup(html_block(right))
    one, other = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (left, right))
    shown = (Markup(), Markup())
    for kind, a, b, c, d in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        parts = (Markup(html_block("".join(words))) for words in (one[a:b], other[c:d]))
        marked = (Markup(f"<mark>{part}</mark>") if part and kind != "equal" else part for part in parts)
        shown = (shown[0] + next(marked), shown[1] + next(marked))
    return shown
