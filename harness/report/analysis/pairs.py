"""Compares policies by the instances that both answered: significant differences, and where answers differ.

It knows suites, instances and statistics; it does not know how a comparison is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from harness.report.inputs.data import SuiteResults
from harness.report.inputs.instances import AskedInstance, asked, instance_values
from harness.statistics import ALPHA, Change, compare_right_wrong, compare_values, holm, is_right_or_wrong
from harness.suite.score import BITS_PER_BYTE

ALL = ""
"""The scope of a comparison over all run entries together."""

_MOST_PAIRED = 6
"""Policies of which every pair is compared; of more, each with the first."""

Values = Mapping[tuple[str, str], Mapping[str, float]]
"""By run entry and policy: the main metric by instance."""


@dataclass(frozen=True)
class Paired:
    """Two policies on the same instances of one run entry, or of all."""

    left: str
    right: str
    entry: str
    """`ALL` for all run entries whose metric is an accuracy."""

    instances: int
    only_left: int | None
    only_right: int | None
    """Instances that only one of them has right; None where answers are not just right or wrong."""

    change: Change
    """Right less left."""

    corrected: float
    """Its p, corrected for the comparisons of its scope (over all run entries, or within them)."""

    @property
    def significant(self) -> bool:
        """Whether the instances show a difference."""
        return self.corrected < ALPHA


def read_values(suite: SuiteResults) -> Values:
    """All instances of a suite, by run entry and policy.

    Raises:
        UsageError: if a file is damaged.
    """
    found = {(r.run_entry, r.policy): instance_values(r) for r in suite.results}
    return {key: values for key, values in found.items() if values}


def pairs_of(suite: SuiteResults) -> list[tuple[str, str]]:
    """Which policies are set against each other over all run entries."""
    names = [policy.name for policy in suite.policies]
    if len(names) <= _MOST_PAIRED:
        return list(combinations(names, 2))
    return [(names[0], other) for other in names[1:]]


def compare(suite: SuiteResults, values: Values) -> list[Paired]:
    """Every pair over all run entries, then every policy against the first one by run entry."""
    overall = [c for left, right in pairs_of(suite) if (c := over_all(suite, values, left, right))]
    first = suite.policies[0].name
    single = [
        c
        for entry in suite.run_entries
        for policy in suite.policies[1:]
        if (c := in_entry(suite, values, entry, first, policy.name))
    ]
    return [*corrected(overall), *corrected(single)]


def corrected(found: Sequence[Paired]) -> list[Paired]:
    """The same comparisons with their p corrected for their number."""
    p_values = holm([paired.change.p for paired in found])
    return [replace(paired, corrected=p) for paired, p in zip(found, p_values, strict=True)]


def over_all(suite: SuiteResults, values: Values, left: str, right: str) -> Paired | None:
    """Two policies on all run entries whose metric lies between 0 and 1, every instance with equal weight."""
    one: dict[str, float] = {}
    other: dict[str, float] = {}
    for entry in suite.run_entries:
        results = (suite.result(entry, left), suite.result(entry, right))
        if all(r is not None and r.metric != BITS_PER_BYTE and r.is_accuracy for r in results):
            one |= {f"{entry}\n{key}": v for key, v in values.get((entry, left), {}).items()}
            other |= {f"{entry}\n{key}": v for key, v in values.get((entry, right), {}).items()}
    return _paired(left, right, ALL, one, other)


def in_entry(suite: SuiteResults, values: Values, entry: str, left: str, right: str) -> Paired | None:
    """Two policies on one run entry; None where it has not the same metric or no common instance."""
    results = suite.result(entry, left), suite.result(entry, right)
    if any(r is None for r in results) or len({r.metric for r in results if r}) > 1:
        return None
    return _paired(left, right, entry, values.get((entry, left), {}), values.get((entry, right), {}))


def _paired(
    left: str, right: str, entry: str, one: Mapping[str, float], other: Mapping[str, float]
) -> Paired | None:
    common = [key for key in one if key in other]
    if not common:
        return None
    pairs = [(one[key], other[key]) for key in common]
    if all(is_right_or_wrong([values[key] for key in common]) for values in (one, other)):
        counts = {kind: pairs.count(kind) for kind in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))}
        change = compare_right_wrong(*counts.values())
        return Paired(left, right, entry, len(pairs), counts[1.0, 0.0], counts[0.0, 1.0], change, change.p)
    change = compare_values([a for a, _ in pairs], [b for _, b in pairs])
    return Paired(left, right, entry, len(pairs), None, None, change, change.p)


@dataclass(frozen=True)
class Disagreement:
    """One request to which two policies gave different answers."""

    entry: str
    left: AskedInstance
    right: AskedInstance
    left_value: float | None
    right_value: float | None
    """The main metric; None where it was not stored."""


@dataclass(frozen=True)
class Disagreements:
    """The requests on which two policies differ."""

    left: str
    right: str
    compared: int
    """Requests that both answered."""

    differing: int
    """Those with different answers."""

    shown: tuple[Disagreement, ...]
    """The first of them, those first whose scores differ; the rest is left out."""


def disagreements(suite: SuiteResults, values: Values, most: int) -> list[Disagreements]:
    """Where every policy's answers differ from the first one's.

    Args:
        most: requests that are kept, shared evenly among the policies.

    Raises:
        UsageError: if a file is damaged.
    """
    others = [policy.name for policy in suite.policies[1:]]
    share = max(1, most // max(1, len(others)))
    first = suite.policies[0].name
    found: dict[str, list[Disagreement]] = {name: [] for name in others}
    compared = dict.fromkeys(others, 0)
    for entry in suite.run_entries:  # one run entry at a time: prompts of a large suite fill memory
        result = suite.result(entry, first)
        mine = asked(result) if result else {}
        for name in others:
            other = suite.result(entry, name)
            theirs = asked(other) if mine and other else {}
            common = [key for key in mine if key in theirs]
            compared[name] += len(common)
            one, two = values.get((entry, first), {}), values.get((entry, name), {})
            found[name] += [
                Disagreement(entry, mine[key], theirs[key], one.get(key[0]), two.get(key[0]))
                for key in common
                if mine[key].answer != theirs[key].answer
            ]
    return [
        Disagreements(first, name, compared[name], len(found[name]), _spread(found[name], share))
        for name in others
        if compared[name]
    ]


def _spread(found: Sequence[Disagreement], most: int) -> tuple[Disagreement, ...]:
    """The first ``most``: those whose scores differ before the others, run entries in turn."""
    queues: dict[tuple[bool, str], list[Disagreement]] = {}
    for item in found:
        queues.setdefault((item.left_value == item.right_value, item.entry), []).append(item)
    chosen: list[Disagreement] = []
    for same in (False, True):
        lists = [items for (equal, _), items in queues.items() if equal is same]
        for place in range(max(map(len, lists), default=0)):
            chosen += [items[place] for items in lists if place < len(items)]
    entries = list(dict.fromkeys(item.entry for item in found))
    kept = chosen[:most]
    return tuple(sorted(kept, key=lambda d: (entries.index(d.entry), d.left_value == d.right_value)))
