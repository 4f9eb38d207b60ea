"""Writes a report's content as one HTML page: no script, no network, readable in light and dark.

It knows HTML and CSS; every text that reaches the page goes through `html_text`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from harness.plot_base import STYLE
from harness.report_content import Cell, Content, Figure, Name, Section, Table
from harness.report_text import html_text

_CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--muted:#59636e;--line:#d5dae0;--paper:#fff;--raised:#f5f7f9;
--accent:#0a5fb4;--warn:#8a4b00;--warn-paper:#fff6e6}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--muted:#a3adb9;--line:#333b45;--paper:#14171c;
--raised:#1c2128;--accent:#7ab8ff;--warn:#ffc978;--warn-paper:#2b2213}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Liberation Sans",sans-serif}
main{max-width:76rem;margin:0 auto;padding:1.25rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.6rem 0 .6rem;padding-top:1rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .4rem}
p{max-width:46rem;margin:.5rem 0 1rem;overflow-wrap:anywhere}
nav{margin:1.2rem 0;display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;font-size:.95rem}
a{color:var(--accent)}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,"Liberation Mono",monospace}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1rem;margin:0}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
.mind{border-left:4px solid var(--warn);background:var(--warn-paper);padding:.6rem .9rem;margin:1rem 0;
max-width:46rem;overflow-wrap:anywhere}
@media (min-width:68rem){.beside{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,34rem);
gap:0 3.5rem;align-items:start}}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1.5rem 2.5rem;
align-items:start}
figure{margin:.5rem 0;min-width:0}
figure svg{display:block;width:100%;max-width:33rem;height:auto;overflow:visible}
figcaption{color:var(--muted);font-size:.92rem;margin-top:.5rem}
details{margin:.6rem 0;min-width:0}
summary{cursor:pointer;color:var(--accent);font-size:.92rem}
.scroll{overflow-x:auto;max-width:100%;margin:.5rem 0;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;font-size:.9rem;line-height:1.4;min-width:100%}
th,td{padding:.36rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line);
font-variant-numeric:tabular-nums;vertical-align:top}
tr:last-child td{border-bottom:0}
thead th{background:var(--raised);font-weight:600;vertical-align:bottom;white-space:normal;min-width:5rem;
max-width:16rem;overflow-wrap:break-word}
.name{text-align:left}
td.name{white-space:normal;max-width:26rem;overflow-wrap:break-word}
td.name:first-child{min-width:9.5rem}
.facts{width:fit-content}.facts table{min-width:0}.facts td:first-child{color:var(--muted);min-width:8rem}
@media print{.scroll{overflow:visible}main{max-width:none}}
"""


def page(content: Content, pictures: Mapping[str, str]) -> str:
    """The whole page; ``pictures`` are SVG texts by file name."""
    title = html_text(content.title)
    links = "".join(f'<a href="#{_anchor(s.title)}">{html_text(s.title)}</a>' for s in content.sections)
    facts = "".join(f"<dt>{html_text(key)}</dt><dd>{_inline(value)}</dd>" for key, value in content.facts)
    warnings = "".join(f'<p class="mind">{html_text(warning)}</p>' for warning in content.warnings)
    body = "\n".join(_section(section, pictures) for section in content.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_CSS}{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<dl>{facts}</dl>
{warnings}
<nav aria-label="sections">{links}</nav>
{body}
</main>
</body>
</html>
"""


def _section(section: Section, pictures: Mapping[str, str]) -> str:
    """Text and tables; a single picture stands beside them where the screen is wide enough."""
    words = [f"<p>{html_text(paragraph)}</p>" for paragraph in section.text]
    for table in section.tables:
        named = len(section.tables) > 1 or section.figures
        words.append((f"<h3>{html_text(table.title)}</h3>" if named else "") + _table(table))
    words += [_folded(table) for table in section.more]
    figures = "".join(_figure(figure, pictures[figure.file]) for figure in section.figures)
    body = "\n".join(words)
    if len(section.figures) == 1:
        body = f'<div class="beside"><div>{body}</div>{figures}</div>'
    elif figures:
        body = f'{body}<div class="figures">{figures}</div>'
    return f'<section id="{_anchor(section.title)}"><h2>{html_text(section.title)}</h2>\n{body}\n</section>'


def _figure(figure: Figure, svg: str) -> str:
    caption = f"<figcaption>{html_text(figure.caption)}</figcaption>"
    return f"<figure>{svg}{caption}{_folded(figure.data)}</figure>"


def _folded(table: Table) -> str:
    return (
        f"<details><summary>{html_text(table.title)}: the data as a table</summary>{_table(table)}</details>"
    )


def _table(table: Table) -> str:
    facts = not any(table.columns)
    head = "" if facts else f"<thead><tr>{_cells('th', table.columns, table.names)}</tr></thead>"
    rows = "".join(f"<tr>{_cells('td', row, table.names)}</tr>" for row in table.rows)
    kind = "scroll facts" if facts else "scroll"
    return f'<div class="{kind}" tabindex="0"><table>{head}<tbody>{rows}</tbody></table></div>'


def _cells(tag: str, cells: Sequence[Cell], names: int) -> str:
    opened = [f'<{tag} class="name">' if index < names else f"<{tag}>" for index, _ in enumerate(cells)]
    opened = [f'<{tag} class="name">' if index < names else f"<{tag}>" for index, _ in enumerate(cells)]
    return "".join(f"{start}{_inline(cell)}</{tag}>" for start, cell in zip(opened, cells, strict=True))


def _inline(cell: Cell) -> str:
    """A name may be broken after its own signs, such as underscores, where a column is narrow."""
    text = html_text(cell)
    if isinstance(cell, Name):
        return "<code>" + re.sub(r"([_:,=/]+)", r"\1<wbr>", text) + "</code>"
    return text


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
