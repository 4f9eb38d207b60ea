"""Writes a report: one HTML page that stands alone, Markdown, pictures as SVG, figures as CSV and Parquet.

It knows which files there are and Markdown; what they say is in `harness.report.sections`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import UsageError
from engine.files.whole import write_whole
from harness.escape import markdown_code, markdown_text
from harness.report.analysis.findings import findings
from harness.report.analysis.systems import read_systems
from harness.report.content import Cell, Content, Name, Table
from harness.report.evidence import gather
from harness.report.figures import FigureRow, figures, to_csv, to_parquet
from harness.report.html import page
from harness.report.inputs.data import SuiteResults, merge
from harness.report.inputs.reading import read_suite
from harness.report.plots.style import standing_alone, titled
from harness.report.sections import make_content, make_content_without_suite
from harness.text_table import markdown_table


@dataclass(frozen=True)
class Report:
    """Where a report is."""

    markdown: Path
    html: Path
    csv: Path
    parquet: Path
    pictures: tuple[Path, ...]


def write_report(
    results: Path, names: Sequence[str], output_dir: Path, comparisons: Sequence[str] = ()
) -> Report:
    """Read one or more suites, and comparisons with other systems, and write one report of all.

    The same results give the same bytes. Only fixed names inside ``output_dir`` are written.

    Args:
        results: folder of all results: runs/<suite>, curves/<suite>, comparisons/<name>, paper/*.json.
        names: of the suites, or of curves that have none; none for comparisons alone.
        output_dir: folder of the report; made if it is not there.

    Raises:
        UsageError: if a file is missing or damaged.
        StorageError: if the report cannot be written.
    """
    systems = [read_systems(results / "comparisons" / name) for name in comparisons]
    suites = [name for name in names if not _is_curve_alone(results, name)]
    if suites:
        read = [_read(results, name) for name in suites]
        if len(read) > 1:  # folders' names differ, those in copied tables need not
            read = [replace(suite, suite=name) for suite, name in zip(read, suites, strict=True)]
        suite = findings(merge(read))
        evidence = gather(suite, results, names, systems)
        return write_content(make_content(suite, evidence), output_dir, figures(suite, evidence))
    evidence = gather(None, results, names, systems)
    content = make_content_without_suite([*names, *comparisons], evidence)
    return write_content(content, output_dir, figures(None, evidence))


def _is_curve_alone(results: Path, name: str) -> bool:
    has_runs = (results / "runs" / name / "table.json").is_file()
    return not has_runs and (results / "curves" / name / "curve.json").is_file()


def _read(results: Path, name: str) -> SuiteResults:
    folder = results / "runs" / name
    if not folder.is_dir():
        raise UsageError(f"{folder} holds no finished suite: first run_helm.py run --suite {name}")
    return read_suite(folder)


def write_content(content: Content, output_dir: Path, rows: Sequence[FigureRow]) -> Report:
    """Write a report's content in every form.

    Raises:
        StorageError: if it cannot be written.
    """
    drawn = [figure for section in content.sections for figure in section.figures]
    pictures = {f.file: titled(f.draw(), f.file.removesuffix(".svg"), f.alt) for f in drawn}
    for name, svg in pictures.items():
        write_whole(output_dir / name, standing_alone(svg))
    write_whole(output_dir / "figures.csv", to_csv(rows))
    write_whole(output_dir / "figures.parquet", to_parquet(rows))
    write_whole(output_dir / "report.md", markdown(content))
    write_whole(output_dir / "report.html", page(content, pictures))
    return Report(
        markdown=output_dir / "report.md",
        html=output_dir / "report.html",
        csv=output_dir / "figures.csv",
        parquet=output_dir / "figures.parquet",
        pictures=tuple(output_dir / name for name in pictures),
    )


def markdown(content: Content) -> str:
    """The report as Markdown; pictures are linked, every table is written out."""
    lines = [f"# {markdown_text(content.title)}", "", markdown_text(content.lead), ""]
    lines += [*_table(Table("", ("", ""), content.facts, names=2))]
    for warning in content.warnings:
        lines += ["", f"> **Note:** {markdown_text(warning)}"]
    for section in content.sections:
        lines += ["", f"## {markdown_text(section.title)}"]
        for paragraph in section.text:
            lines += ["", markdown_text(paragraph)]
        for figure in section.figures:
            lines += ["", f"![{markdown_text(figure.alt)}]({figure.file})"]
            lines += ["", f"*{markdown_text(figure.caption)}*", "", *_table(figure.data)]
        for table in (*section.tables, *section.more):
            lines += ["", f"**{markdown_text(table.title)}**", "", *_table(table)]
        for group in section.groups:
            lines += ["", f"**{markdown_text(group.title)}**: {markdown_text(group.note)}"]
    return "\n".join([*lines, ""])


def _table(table: Table) -> list[str]:
    rows = ([_cell(cell) for cell in row] for row in (table.columns, *table.rows))
    return markdown_table(rows, table.names, padded=False)


def _cell(cell: Cell) -> str:
    return markdown_code(cell) if isinstance(cell, Name) else markdown_text(cell)
