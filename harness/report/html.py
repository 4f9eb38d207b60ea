"""Writes a report's content as one HTML page: works from disk, loads nothing, readable in light and dark.

It knows HTML; style and script are files of ``harness/report/assets``. Every text that reaches the page goes
through `html_text` or `html_block`. The page's one script sorts tables; its policy allows no other, by
digest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

from harness.escape import html_block, html_text, shortened
from harness.report.content import (
    Card,
    Case,
    CaseGroup,
    Cell,
    Content,
    Figure,
    Name,
    Number,
    Reply,
    Section,
    Table,
)
from harness.report.plots.style import STYLE, chip

_ASSETS = Path(__file__).resolve().parent / "assets"


@cache
def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def page(content: Content, pictures: Mapping[str, str]) -> str:
    """The whole page; ``pictures`` are SVG texts by file name."""
    title, script = html_text(content.title), _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    links = "".join(f'<a href="#{_anchor(s.title)}">{html_text(s.title)}</a>' for s in content.sections)
    facts = "".join(
        f"<div><dt>{html_text(key)}</dt><dd>{_inline(value)}</dd></div>" for key, value in content.facts
    )
    warnings = "".join(f'<p class="mind">{html_text(warning)}</p>' for warning in content.warnings)
    body = "\n".join(_section(section, pictures) for section in content.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{_asset("report.css")}{STYLE}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><div>
<p class="brand">Tierbench report</p>
<h1>{title}</h1>
<p class="lead">{html_text(content.lead)}</p>
<dl>{facts}</dl>
{warnings}
</div></header>
<div class="page">
<nav aria-label="sections">{links}</nav>
<main id="content">
{body}
<footer>Written by Tierbench. A click on a column's head sorts a table; every picture has its data
behind it.</footer>
</main>
</div>
<script>{script}</script>
</body>
</html>
"""


def _section(section: Section, pictures: Mapping[str, str]) -> str:
    """Text, cards and tables; a single picture stands beside them where the screen is wide enough."""
    words = [f"<p>{html_text(paragraph)}</p>" for paragraph in section.text]
    if section.cards:
        words.append(f'<div class="cards">{"".join(map(_card, section.cards))}</div>')
    tables = []
    for table in section.tables:
        named = len(section.tables) > 1 or section.figures
        tables.append((f"<h3>{html_text(table.title)}</h3>" if named else "") + _table(table))
    tables += [_folded(table) for table in section.more]
    figures = "".join(_figure(figure, pictures[figure.file]) for figure in section.figures)
    narrow = all(len(table.columns) <= 5 for table in section.tables)
    if len(section.figures) == 1:
        words += tables if narrow else []
        body = f'<div class="beside"><div>{"".join(words)}</div>{figures}</div>'
        body += "" if narrow else "".join(tables)
    else:
        shown = f'<div class="figures">{figures}</div>' if figures else ""
        body = "\n".join([*words, shown, *tables, *map(_group, section.groups)])
    return f'<section id="{_anchor(section.title)}"><h2>{html_text(section.title)}</h2>\n{body}\n</section>'


def _card(card: Card) -> str:
    facts = "".join(
        f'<li><span class="label">{html_text(label)}</span><b>{html_text(figure)}</b>'
        f'<span class="remark">{html_text(remark)}</span></li>'
        for label, figure, remark in card.facts
    )
    return f'<div class="card"><h3>{_inline(card.name)}</h3><ul>{facts}</ul></div>'


def _figure(figure: Figure, svg: str) -> str:
    caption = f"<figcaption>{html_text(figure.caption)}</figcaption>"
    return f"<figure>{svg}{caption}{_folded(figure.data)}</figure>"


def _folded(table: Table) -> str:
    return (
        f"<details><summary>{html_text(table.title)}: the data as a table</summary>{_table(table)}</details>"
    )


def _group(group: CaseGroup) -> str:
    cases = "".join(map(_case, group.cases))
    return (
        f'<details class="group"><summary>{html_text(group.title)}</summary>'
        f'<p class="label">{html_text(group.note)}</p>{cases}</details>'
    )


def _case(case: Case) -> str:
    one, other = _marked(case.left.text.strip(), case.right.text.strip())
    gist = f"{shortened(case.left.text.strip(), 40)} / {shortened(case.right.text.strip(), 40)}"
    correct = ", ".join(case.correct) or "none is stored"
    return (
        f'<details class="case"><summary><code>{html_text(case.title)}</code>'
        f'<span class="gist">{html_text(gist)}</span></summary>'
        f'<span class="label">question</span><pre dir="auto">{html_block(case.question)}</pre>'
        f'<span class="label">right answer</span><pre dir="auto">{html_block(correct)}</pre>'
        f'<div class="answers">{_reply(case.left, one)}{_reply(case.right, other)}</div>'
        f"<details><summary>the whole prompt</summary>"
        f'<pre dir="auto">{html_block(case.prompt)}</pre></details></details>'
    )


def _reply(reply: Reply, answer: str) -> str:
    kind = "" if reply.right is None else "right" if reply.right else "wrong"
    word = f"score {reply.score}" if reply.right is None else "✓ right" if reply.right else "✗ wrong"
    return (
        f'<div class="{kind}"><div class="who">{_inline(reply.policy)}<span class="verdict">{html_text(word)}'
        f'</span></div><pre dir="auto">{answer}</pre></div>'
    )


_MOST_COMPARED = 2_000


def _marked(left: str, right: str) -> tuple[str, str]:
    """Two answers with the words that differ marked; very long ones are shown as they are."""
    if max(len(left), len(right)) > _MOST_COMPARED:
        return html_block(left), html_block(right)
    one, other = re.findall(r"\s+|\w+|[^\w\s]", left), re.findall(r"\s+|\w+|[^\w\s]", right)
    shown: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        for place, part in ((0, "".join(one[a:b])), (1, "".join(other[c:d]))):
            if part:
                text = html_block(part)
                shown[place].append(text if kind == "equal" else f"<mark>{text}</mark>")
    return "".join(shown[0]), "".join(shown[1])


def _table(table: Table) -> str:
    facts = not any(table.columns)
    head = "" if facts else f"<thead><tr>{_cells('th', table.columns, table.names)}</tr></thead>"
    rows = "".join(f"<tr>{_cells('td', row, table.names)}</tr>" for row in table.rows)
    kind = "scroll facts" if facts else "scroll"
    label = html_text(table.title) or "facts"
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{label}"><table>{head}'
        f"<tbody>{rows}</tbody></table></div>"
    )


_PROSE = 60
"""Characters from which on a cell's text is read as a sentence, and given room."""


def _cells(tag: str, cells: Sequence[Cell], names: int) -> str:
    return "".join(_cell(tag, cell, index < names) for index, cell in enumerate(cells))


def _cell(tag: str, cell: Cell, is_name: bool) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    kind = ""
    if is_name:
        prose = not isinstance(cell, Name) and len(str(cell)) > _PROSE
        kind = ' class="name prose"' if prose else ' class="name"'
    value = f' data-v="{cell.value:.10g}"' if isinstance(cell, Number) else ""
    return f"<{tag}{scope}{kind}{value}>{_inline(cell)}</{tag}>"


def _inline(cell: Cell) -> str:
    """A name may be broken after its own signs, such as underscores, where a column is narrow."""
    text = html_text(cell)
    if isinstance(cell, Name):
        marker = "" if cell.mark is None else chip(cell.mark)
        code = "<code>" + re.sub(r"([_:,=/-]+)", r"\1<wbr>", text) + "</code>"
        return f'<span class="policy">{marker}{code}</span>' if marker else code
    return text


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
