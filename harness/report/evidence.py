"""Gathers what a report shows beside a suite's tables: single instances, curves, standings, and more.

It knows where things lie in the results' folder; it does not know how they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.report.analysis.bits import Bits, of_suite, read_curve
from harness.report.analysis.findings import Findings
from harness.report.analysis.frontier import Standing, standings
from harness.report.analysis.pairs import Disagreements, Paired, compare, disagreements, read_values
from harness.report.analysis.published import Published, read_published
from harness.report.analysis.systems import Systems

MOST_CASES = 60
"""Single requests that a page shows; the rest is in HELM's own files."""


@dataclass(frozen=True)
class Evidence:
    """What was found beside the tables; each may be empty."""

    paired: Sequence[Paired] = ()
    disagreements: Sequence[Disagreements] = ()
    standings: Sequence[Standing] = ()
    bits: Sequence[Bits] = ()
    systems: Sequence[Systems] = ()
    published: Sequence[Published] = ()


def gather(
    suite: Findings | None, results: Path, names: Sequence[str], systems: Sequence[Systems] = ()
) -> Evidence:
    """Read it.

    Args:
        suite: None if there is none.
        results: folder that holds runs, curves, comparisons and so on.
        names: of the suites that ``suite`` was merged from; curves of these names belong to it.

    Raises:
        UsageError: if a file is damaged.
    """
    curves = [read_curve(results / "curves" / name / "curve.json") for name in names]
    published = read_published(results / "paper")
    if suite is None:
        return Evidence(bits=[c for c in curves if c is not None], systems=systems, published=published)
    values, own = read_values(suite), of_suite(suite)
    return Evidence(
        paired=compare(suite, values) if len(suite.policies) > 1 else [],
        disagreements=disagreements(suite, values, MOST_CASES),
        standings=standings(suite),
        bits=[bits for bits in (*curves, own) if bits is not None],
        systems=systems,
        published=published,
    )
