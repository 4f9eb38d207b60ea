"""What changed between two suites: accuracy by paired instances, speed, memory, settings; on one screen.

It knows suites; the same lines are printed and written as Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import UsageError
from engine.files.whole import write_whole
from harness.escape import markdown_text, plain, shortened
from harness.report.analysis.findings import Findings, findings
from harness.report.analysis.pairs import Paired, Values, corrected, in_entry, over_all, read_values
from harness.report.content import MISSING, per_second, ratio, signed, signed_interval, size
from harness.report.inputs.data import PolicyResult, SuiteResults, merge
from harness.report.inputs.reading import read_suite
from harness.text_table import markdown_table

_MOST_ENTRIES = 8
_MOST_SETTINGS = 6
_NAME = 34


@dataclass(frozen=True)
class Changes:
    """Tables and lines; the first row of a table is its head."""

    title: str
    policies: Sequence[Sequence[str]]
    entries: Sequence[Sequence[str]]
    notes: Sequence[str]

    def text(self) -> str:
        """For a terminal."""
        parts = [[self.title], markdown_table(self.policies, left=1)]
        if len(self.entries) > 1:
            parts.append(markdown_table(self.entries, left=2))
        return "\n\n".join("\n".join(part) for part in (*parts, list(self.notes))) + "\n"

    def markdown(self) -> str:
        """For a pull request."""
        tables = [_escaped(rows) for rows in (self.policies, self.entries) if len(rows) > 1]
        parts = [f"# {markdown_text(self.title)}"]
        parts += ["\n".join(markdown_table(rows, left=1)) for rows in tables]
        parts += [f"- {markdown_text(note)}" for note in self.notes]
        return "\n\n".join(parts) + "\n"


def _escaped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[markdown_text(cell) for cell in row] for row in rows]


def changes(before: Path, after: Path) -> Changes:
    """Compare two suites' folders.

    Policies are paired by name; where no name is in both and each suite has one policy, these two are.

    Raises:
        UsageError: if a file is damaged, or no policies can be paired.
    """
    names = (before.name, after.name) if before.name != after.name else ("before", "after")
    one, other = (
        replace(read_suite(path), suite=name) for path, name in zip((before, after), names, strict=True)
    )
    both = findings(merge([one, other]))
    values = read_values(both)
    pairs = _pairs(one, other)
    count = len(one.policies)
    left = {p.name: q for p, q in zip(one.policies, both.policies[:count], strict=True)}
    right = {p.name: q for p, q in zip(other.policies, both.policies[count:], strict=True)}
    head = ("policy", "accuracy", "change", "95 % interval", "verdict", "total token/s", "ratio")
    rows: list[Sequence[str]] = [head]
    single: list[Paired] = []
    overall = [over_all(both, values, left[a].name, right[b].name) for a, b in pairs]
    shown = iter(corrected([paired for paired in overall if paired]))
    for (a, b), paired in zip(pairs, overall, strict=True):
        rows.append(_policy_row(both, a, left[a], right[b], next(shown) if paired else None))
        single += [
            found
            for entry in both.run_entries
            if (found := in_entry(both, values, entry, left[a].name, right[b].name))
        ]
    single = corrected(single)
    notes = [*_entry_notes(both, values, single), *_memory([(left[a], right[b]) for a, b in pairs])]
    notes += _settings(one, other, pairs)
    return Changes(f"{one.suite} → {other.suite}", rows, _entry_rows(both, single), [plain(n) for n in notes])


def write_changes(found: Changes, path: Path) -> None:
    """Write them as Markdown.

    Raises:
        StorageError: if it cannot be written.
    """
    write_whole(path, found.markdown())


def _pairs(one: SuiteResults, other: SuiteResults) -> list[tuple[str, str]]:
    names, others = [p.name for p in one.policies], [p.name for p in other.policies]
    common = [(name, name) for name in names if name in others]
    if common:
        return common
    if len(names) == len(others) == 1:
        return [(names[0], others[0])]
    raise UsageError(
        f"the suites {one.suite!r} ({', '.join(names)}) and {other.suite!r} ({', '.join(others)}) "
        f"have no policy in common: compare suites with a policy of the same name, or with one policy each"
    )


def _policy_row(
    both: Findings, name: str, before: PolicyResult, after: PolicyResult, paired: Paired | None
) -> Sequence[str]:
    means = [both.means.get(p.name) for p in (before, after)]
    accuracy = " → ".join(f"{mean.value:.3f}" if mean else MISSING for mean in means)
    rates = [p.total_per_second for p in (before, after)]
    return [
        shortened(name, _NAME), accuracy,
        signed(paired.change.value) if paired else MISSING,
        signed_interval(paired.change.low, paired.change.high) if paired else MISSING,
        _verdict(paired) if paired else "no common instances",
        " → ".join(str(per_second(rate)) for rate in rates), str(ratio(rates[1], rates[0])),
    ]  # fmt: skip


def _verdict(paired: Paired) -> str:
    if paired.significant:
        p = f"p {paired.corrected:.3f}" if paired.corrected >= 0.001 else "p < 0.001"
        return f"significant, {p}"
    return f"not significant (detects {paired.change.detectable:.3f})"


def _entry_rows(both: Findings, single: Sequence[Paired]) -> list[Sequence[str]]:
    """The run entries that changed most, significant changes first."""
    rows: list[Sequence[str]] = [("run entry", "policy", "instances", "before → after", "change", "verdict")]
    changed = [p for p in single if p.change.value]
    for paired in sorted(changed, key=lambda p: (not p.significant, -abs(p.change.value)))[:_MOST_ENTRIES]:
        found = [both.result(paired.entry, name) for name in (paired.left, paired.right)]
        values = " → ".join(f"{r.value:.3f}" if r and r.value is not None else MISSING for r in found)
        name = paired.right.split("/", 1)[1]
        rows.append([
            shortened(paired.entry, 44), shortened(name, _NAME), f"{paired.instances:,}", values,
            signed(paired.change.value), _verdict(paired),
        ])  # fmt: skip
    return rows


def _entry_notes(both: Findings, values: Values, single: Sequence[Paired]) -> list[str]:
    changed = [p for p in single if p.change.value]
    notes = []
    if single:
        notes.append(
            f"{len(changed)} of {len(single)} run entries × policies changed, "
            f"{sum(p.significant for p in changed)} of them significantly; "
            f"{len(single) - len(changed)} have the same value."
        )
    if not values:
        notes.append("No values of single instances are stored: differences cannot be tested.")
    suites = {e: {r.policy.split("/")[0] for r in both.results if r.run_entry == e} for e in both.run_entries}
    lacking = [entry for entry, found in suites.items() if len(found) < 2]
    if lacking:
        notes.append(f"In one suite only: {', '.join(shortened(e, 44) for e in lacking[:4])}"
                     + (f" and {len(lacking) - 4} more." if len(lacking) > 4 else "."))  # fmt: skip
    return notes


def _memory(pairs: Sequence[tuple[PolicyResult, PolicyResult]]) -> list[str]:
    """Peaks that changed by more than a hundredth."""
    found = []
    for before, after in pairs:
        for tier, one in before.tiers.items():
            other = after.tiers[tier]
            if one.peak and other.peak and abs(other.peak / one.peak - 1) > 0.01:
                name = shortened(before.name.split("/", 1)[-1], _NAME)
                found.append(f"{name}, peak memory on {tier}: {size(one.peak)} → {size(other.peak)}")
    return _first(found, "more peaks")


def _settings(one: SuiteResults, other: SuiteResults, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Facts that are not the same in both."""
    before = {p.name: p for p in one.policies}
    after = {p.name: p for p in other.policies}
    found: dict[str, None] = {}
    for a, b in pairs:
        for kind in ("model", "hardware", "software", "definition"):
            facts, others = getattr(before[a], kind), getattr(after[b], kind)
            about = f"policy {a}, " if kind == "definition" else ""
            for key in dict.fromkeys((*facts, *others)):
                if key not in ("path", "name") and facts.get(key) != others.get(key):
                    values = (shortened(str(f.get(key, "not recorded")), 40) for f in (facts, others))
                    found[f"{about}{key}: {' → '.join(values)}"] = None
    return _first(list(found), "more settings differ") or ["Same model, machine, software and policies."]


def _first(lines: Sequence[str], more: str) -> list[str]:
    """The first of many lines, and how many are left out."""
    left_out = len(lines) - _MOST_SETTINGS
    return [*lines[:_MOST_SETTINGS], *([f"and {left_out} {more}"] if left_out > 0 else [])]
