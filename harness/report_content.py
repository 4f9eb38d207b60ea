"""What a report says: sections of text, tables and pictures, the same for Markdown and HTML.

It knows what the numbers mean; it does not know how a page is written or a picture is drawn.
Texts and cells are plain text, taken from data as they are: whoever writes a page escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.units import format_bytes, format_seconds
from harness.report_data import TENSOR_KINDS, PolicyRun, Result, SuiteResults

LANE_WORDS = {
    "compute": "arithmetic",
    "weights": "weights coming up",
    "kv_in": "KV cache and hidden states coming up",
    "kv_out": "KV cache and hidden states going down",
    "host_attention": "attention on the host, beside the device",
}
MISSING = "–"


class Name(str):
    """A cell that holds somebody's name for something: shown in the type of code."""


Cell = str | Name


@dataclass(frozen=True)
class Table:
    """Columns and rows; the first ``names`` columns are flush left, the others are figures."""

    title: str
    columns: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1


@dataclass(frozen=True)
class Figure:
    """A picture and the table it was drawn from."""

    file: str
    """Name of the SVG file."""

    alt: str
    """What it shows, for who cannot see it."""

    caption: str
    data: Table
    draw: Callable[[], str]
    """Makes the SVG."""


@dataclass(frozen=True)
class Section:
    """One heading with what belongs to it."""

    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    more: tuple[Table, ...] = ()
    """Tables for who wants to look closer; a page may fold them."""


@dataclass(frozen=True)
class Content:
    """A whole report."""

    title: str
    facts: tuple[tuple[str, Cell], ...]
    """What was run, on what: shown at the top."""

    warnings: tuple[str, ...]
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Mean:
    """A policy's mean accuracy over the run entries that every policy has."""

    value: float
    low: float | None
    high: float | None


def compared_entries(suite: SuiteResults) -> list[str]:
    """Run entries with an accuracy under every policy; only those are averaged."""
    return [
        entry
        for entry in suite.run_entries
        if all((r := suite.result(entry, p.name)) is not None and r.is_accuracy for p in suite.policies)
    ]


def mean_accuracy(suite: SuiteResults, policy: str) -> Mean | None:
    """Mean over run entries, equal weight; its interval takes the entries as independent.

    The half width is the root of the sum of the entries' squared half widths over their number, above
    and below separately (the MOVER of G. Y. Zou and A. Donner, 2008).
    """
    results = [suite.result(entry, policy) for entry in compared_entries(suite)]
    rows = [r for r in results if r is not None and r.value is not None]
    if not rows:
        return None
    value = math.fsum(r.value or 0.0 for r in rows) / len(rows)
    bounded = [(r.value or 0.0, r.low, r.high) for r in rows if r.low is not None and r.high is not None]
    if len(bounded) < len(rows):
        return Mean(value, None, None)
    below = math.hypot(*(v - low for v, low, _ in bounded)) / len(rows)
    above = math.hypot(*(high - v for v, _, high in bounded)) / len(rows)
    return Mean(value, max(0.0, value - below), min(1.0, value + above))


def kinds(suite: SuiteResults) -> str:
    """The word that every figure of the suite carries: measured, simulated or projected."""
    return " and ".join(dict.fromkeys([*(p.kind for p in suite.policies), *(r.kind for r in suite.results)]))


def summary_table(suite: SuiteResults) -> Table:
    """Policies against each other; differences and ratios to the first one."""
    first = suite.policies[0]
    first_mean = mean_accuracy(suite, first.name)
    rows = []
    for policy in suite.policies:
        mean = mean_accuracy(suite, policy.name)
        change = MISSING
        if mean and first_mean and policy is not first:
            change = _signed(mean.value - first_mean.value)
        rate, first_rate = policy.total_per_second, first.total_per_second
        ratio = f"{rate / first_rate:.2f}×" if rate and first_rate and policy is not first else MISSING
        rows.append((
            Name(policy.name),
            f"{mean.value:.3f}" if mean else MISSING,
            interval(mean.low, mean.high) if mean else MISSING,
            change,
            per_second(policy.generated_per_second),
            per_second(rate),
            ratio,
            *(format_bytes(tier.peak) for tier in policy.tiers),
        ))  # fmt: skip
    tiers = tuple(f"{tier.tier} peak" for tier in first.tiers)
    return Table(
        f"Policies ({kinds(suite)})",
        (
            "policy",
            "mean accuracy",
            "95 % interval",
            "change",
            "generated token/s",
            "total token/s",
            "speed",
            *tiers,
        ),
        tuple(rows),
    )


def _signed(change: float) -> str:
    return f"{change:+.3f}".replace("-", "−") if abs(change) >= 0.0005 else "0.000"


def matrix_table(
    title: str, suite: SuiteResults, cell: Callable[[Result], str], last: Sequence[tuple[Cell, ...]] = ()
) -> Table:
    """Run entries as rows, policies as columns; ``last`` are rows below them."""
    rows: list[tuple[Cell, ...]] = []
    for entry in suite.run_entries:
        results = [suite.result(entry, policy.name) for policy in suite.policies]
        rows.append((Name(entry), *(MISSING if result is None else cell(result) for result in results)))
    rows += list(last)
    return Table(title, ("run entry", *(Name(policy.name) for policy in suite.policies)), tuple(rows))


def accuracy_table(suite: SuiteResults) -> Table:
    """Every run entry under every policy, as the picture shows it, and metrics that it does not show."""
    rows = []
    for entry in suite.run_entries:
        for policy in suite.policies:
            result = suite.result(entry, policy.name)
            rows.append(
                (Name(entry), Name(policy.name), *(_score_cells(result) if result else [MISSING] * 5))
            )
    for policy in suite.policies:
        mean = mean_accuracy(suite, policy.name)
        if mean:
            rows.append((
                "mean", Name(policy.name), "mean",
                f"{mean.value:.3f}", interval(mean.low, mean.high), MISSING,
                f"{len(compared_entries(suite))} run entries",
            ))  # fmt: skip
    columns = ("run entry", "policy", "metric", "value", "95 % interval", "method", "instances")
    return Table(f"Accuracy ({kinds(suite)})", columns, tuple(rows), names=3)


def _score_cells(result: Result) -> list[Cell]:
    value = MISSING if result.value is None else f"{result.value:.3f}"
    return [
        Name(result.metric), value, interval(result.low, result.high),
        result.interval, f"{result.instances:,}",
    ]  # fmt: skip


def throughput_table(suite: SuiteResults) -> Table:
    """Tokens and seconds per policy."""
    rows = tuple(
        (
            Name(p.name), per_second(p.generated_per_second), per_second(p.total_per_second),
            f"{p.requests:,}", f"{p.passes:,}", f"{p.prompt_tokens:,}", f"{p.generated_tokens:,}",
            format_seconds(p.seconds), format_seconds(p.load_seconds),
        )
        for p in suite.policies
    )  # fmt: skip
    columns = (
        "policy", "generated token/s", "total token/s",
        "requests", "passes", "prompt tokens", "generated tokens",
        "time of passes", "load time",
    )  # fmt: skip
    return Table(f"Throughput ({kinds(suite)})", columns, rows)


def entry_throughput_table(suite: SuiteResults) -> Table:
    """Tokens and seconds per run entry."""
    rows = []
    for entry in suite.run_entries:
        for policy in suite.policies:
            result = suite.result(entry, policy.name)
            if result is not None:
                seconds, generated = result.seconds, result.generated_tokens
                rows.append((
                    Name(entry), Name(policy.name),
                    per_second(generated / seconds if seconds and generated else None),
                    per_second(result.total_per_second),
                    f"{result.requests:,}", f"{result.prompt_tokens:,}", f"{generated:,}",
                    format_seconds(seconds),
                ))  # fmt: skip
    columns = (
        "run entry", "policy", "generated token/s", "total token/s",
        "requests", "prompt tokens", "generated tokens",
        "share of pass time",
    )  # fmt: skip
    return Table(f"Throughput per run entry ({kinds(suite)})", columns, tuple(rows), names=2)


def lane_table(suite: SuiteResults) -> Table:
    """Busy seconds and bytes per policy and lane."""
    rows = tuple(
        (
            Name(p.name), Name(lane.lane), f"{lane.share:.3f}", format_seconds(lane.busy_seconds),
            format_bytes(lane.bytes),
            f"{format_bytes(lane.bytes / lane.busy_seconds)}/s" if lane.bytes * lane.busy_seconds else "–",
        )
        for p in suite.policies
        for lane in p.lanes
    )  # fmt: skip
    columns = ("policy", "lane", "busy share", "busy time", "bytes moved", "rate while busy")
    return Table(f"Busy time per lane ({kinds(suite)})", columns, rows, names=2)


def memory_table(suite: SuiteResults) -> Table:
    """Planned and used bytes per policy and tier against the budget."""
    rows = tuple(
        (
            Name(p.name), tier.tier, "none set" if tier.budget is None else format_bytes(tier.budget),
            format_bytes(tier.planned), format_bytes(tier.peak),
            f"{tier.peak / tier.planned:.2f}" if tier.planned else MISSING,
        )
        for p in suite.policies
        for tier in p.tiers
    )  # fmt: skip
    columns = ("policy", "tier", "budget", "planned", "peak used", "used / planned")
    return Table(f"Memory ({kinds(suite)})", columns, rows, names=2)


def placement_table(suite: SuiteResults) -> Table:
    """Fractions device/host/disk, as asked and as achieved."""
    rows = []
    for policy in suite.policies:
        for kind in TENSOR_KINDS:
            fractions = policy.placement.get(kind, {}).values()
            achieved = " / ".join(f"{fraction:.3g}" for fraction in fractions) or MISSING
            asked = policy.definition.get(kind, MISSING).replace("/", " / ")
            rows.append((Name(policy.name), kind.replace("kv", "KV cache"), asked, achieved))
    columns = ("policy", "what", "asked: device / host / disk", "achieved: device / host / disk")
    return Table(f"Placement ({kinds(suite)})", columns, tuple(rows), names=2)


def facts_table(
    title: str, policies: Sequence[PolicyRun], facts: Callable[[PolicyRun], Mapping[str, str]]
) -> Table:
    """Facts as rows; one column where all policies agree, else a column per policy."""
    keys = list(dict.fromkeys(key for policy in policies for key in facts(policy)))
    rows = [(key, [facts(policy).get(key, MISSING) for policy in policies]) for key in keys]
    if all(len(set(values)) == 1 for _, values in rows):
        return Table(title, ("", ""), tuple((key, Name(values[0])) for key, values in rows), names=2)
    columns = ("", *(Name(policy.name) for policy in policies))
    table = tuple((key, *map(Name, values)) for key, values in rows)
    return Table(title, columns, table, names=len(columns))


def interval(low: float | None, high: float | None) -> str:
    """``0.412 to 0.633``."""
    return MISSING if low is None or high is None else f"{low:.3f} to {high:.3f}"


def per_second(rate: float | None) -> str:
    """A rate with three significant digits and no unit; the column names it."""
    if rate is None:
        return MISSING
    return f"{rate:,.{0 if rate >= 100 else 1 if rate >= 10 else 2}f}"
