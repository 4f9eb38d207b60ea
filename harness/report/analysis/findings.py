"""What all sections, tables and pictures of a suite draw from, computed once: names, means, compared entries.

It knows suites and accuracies; it does not know how they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.report.content import Mean, Name, marked
from harness.report.inputs.data import Result, SuiteResults


@dataclass(frozen=True)
class Findings(SuiteResults):
    """A suite with what follows from its results."""

    kinds: str
    """The word that every figure of the suite carries: measured, simulated or projected."""

    names: Mapping[str, Name]
    """Every policy's name with its colour and marker."""

    compared: tuple[str, ...]
    """Run entries with an accuracy under every policy; only those are averaged."""

    means: Mapping[str, Mean]
    """By policy the mean over the compared entries, equal weight; empty where there are none."""


def findings(suite: SuiteResults) -> Findings:
    """Compute them."""
    compared = tuple(
        entry
        for entry in suite.run_entries
        if all((r := suite.result(entry, p.name)) is not None and r.is_accuracy for p in suite.policies)
    )
    means = {
        policy.name: _mean([r for entry in compared if (r := suite.result(entry, policy.name))])
        for policy in suite.policies
        if compared
    }
    kinds = dict.fromkeys([*(p.kind for p in suite.policies), *(r.kind for r in suite.results)])
    return Findings(
        suite.suite,
        suite.results,
        suite.policies,
        kinds=" and ".join(kinds),
        names={policy.name: marked(policy.name, index) for index, policy in enumerate(suite.policies)},
        compared=compared,
        means=means,
    )


def _mean(results: Sequence[Result]) -> Mean:
    """The interval takes the run entries as independent.

    The half width is the root of the sum of the entries' squared half widths over their number, above
    and below separately (the MOVER of G. Y. Zou and A. Donner, 2008).
    """
    values = [r.value or 0.0 for r in results]
    value = math.fsum(values) / len(values)
    below = [v - r.low for v, r in zip(values, results, strict=True) if r.low is not None]
    above = [r.high - v for v, r in zip(values, results, strict=True) if r.high is not None]
    if len(below) < len(values) or len(above) < len(values):
        return Mean(value, None, None)
    low, high = value - math.hypot(*below) / len(values), value + math.hypot(*above) / len(values)
    return Mean(value, max(0.0, low), min(1.0, high))
