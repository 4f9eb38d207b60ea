"""The tables of a suite's report, and the means that they share with its pictures.

It knows what the numbers mean; it does not know how a page is written or a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from engine.spec.record import StreamRecord
from engine.units import format_bytes
from harness.report.analysis.findings import Findings
from harness.report.content import (
    MISSING,
    Cell,
    Name,
    Number,
    Table,
    count,
    fraction,
    interval,
    marked,
    per_second,
    ratio,
    seconds,
    signed,
    size,
    with_interval,
)
from harness.report.inputs.data import NOT_RECORDED, TENSOR_KINDS, PolicyResult, Result

STREAM_WORDS = {
    "compute": "arithmetic",
    "weights": "weights to the device",
    "kv_in": "KV cache, state and hidden states to the device",
    "kv_out": "KV cache, state and hidden states from the device",
    "host_attention": "attention on the host, beside the device",
}


def summary_table(suite: Findings) -> Table:
    """Policies against each other; differences and ratios to the first one."""
    first = suite.policies[0]
    first_mean = suite.means.get(first.name)
    rows = []
    for policy in suite.policies:
        mean = suite.means.get(policy.name)
        change: Cell = MISSING
        if mean and first_mean and policy is not first:
            change = signed(mean.value - first_mean.value)
        rate = policy.total_per_second
        rows.append((
            suite.names[policy.name],
            *with_interval(mean),
            change,
            per_second(policy.generated_per_second),
            per_second(rate),
            ratio(rate, first.total_per_second) if policy is not first else MISSING,
            *(size(tier.peak) for tier in policy.tiers.values()),
        ))  # fmt: skip
    tiers = tuple(f"{tier} peak" for tier in first.tiers)
    columns = (
        "policy", "mean accuracy", "95 % interval", "change", "generated token/s", "total token/s", "speed",
    )  # fmt: skip
    return Table(f"Policies ({suite.kinds})", (*columns, *tiers), tuple(rows))


def matrix_table(
    title: str, suite: Findings, cell: Callable[[Result], Cell], last: Sequence[tuple[Cell, ...]] = ()
) -> Table:
    """Run entries as rows, policies as columns; ``last`` are rows below them."""
    rows: list[tuple[Cell, ...]] = []
    for entry in suite.run_entries:
        results = [suite.result(entry, policy.name) for policy in suite.policies]
        rows.append((Name(entry), *(MISSING if result is None else cell(result) for result in results)))
    rows += list(last)
    return Table(title, ("run entry", *(suite.names[policy.name] for policy in suite.policies)), tuple(rows))


def accuracy_table(suite: Findings) -> Table:
    """Every run entry under every policy, as the picture shows it, and metrics that it does not show."""
    rows = [
        (Name(entry), suite.names[policy.name], *_score_cells(suite.result(entry, policy.name)))
        for entry in suite.run_entries
        for policy in suite.policies
    ]
    for policy in suite.policies:
        mean = suite.means.get(policy.name)
        if mean:
            rows.append((
                "mean", suite.names[policy.name], "mean",
                *with_interval(mean), MISSING, f"{len(suite.compared)} run entries",
            ))  # fmt: skip
    columns = ("run entry", "policy", "metric", "value", "95 % interval", "method", "instances")
    return Table(f"Accuracy ({suite.kinds})", columns, tuple(rows), names=3)


def _score_cells(result: Result | None) -> list[Cell]:
    if result is None:
        return [MISSING] * 5
    return [
        Name(result.metric), fraction(result.value), interval(result.low, result.high),
        result.interval, count(result.instances),
    ]  # fmt: skip


def _rate(stream: StreamRecord) -> Cell:
    rate = stream.bytes / stream.busy_seconds if stream.busy_seconds else 0.0
    return Number(f"{format_bytes(rate)}/s", rate) if rate else MISSING


def throughput_table(suite: Findings) -> Table:
    """Tokens and seconds per policy."""
    rows = tuple(
        (
            suite.names[p.name], per_second(p.generated_per_second), per_second(p.total_per_second),
            count(p.requests), count(p.passes), count(p.prompt_tokens), count(p.generated_tokens),
            seconds(p.seconds), seconds(p.load_seconds),
        )
        for p in suite.policies
    )  # fmt: skip
    columns = (
        "policy", "generated token/s", "total token/s",
        "requests", "passes", "prompt tokens", "generated tokens",
        "time of passes", "load time",
    )  # fmt: skip
    return Table(f"Throughput ({suite.kinds})", columns, rows)


def entry_throughput_table(suite: Findings) -> Table:
    """Tokens and seconds per run entry."""
    rows = tuple(
        (
            Name(entry), suite.names[policy.name],
            per_second(result.generated_per_second), per_second(result.total_per_second),
            count(result.requests), count(result.prompt_tokens), count(result.generated_tokens),
            seconds(result.seconds),
        )
        for entry in suite.run_entries
        for policy in suite.policies
        if (result := suite.result(entry, policy.name)) is not None
    )  # fmt: skip
    columns = (
        "run entry", "policy", "generated token/s", "total token/s",
        "requests", "prompt tokens", "generated tokens",
        "share of pass time",
    )  # fmt: skip
    return Table(f"Throughput per run entry ({suite.kinds})", columns, rows, names=2)


def stream_table(suite: Findings) -> Table:
    """Busy seconds and bytes per policy and stream."""
    rows = tuple(
        (
            suite.names[p.name], Name(name), fraction(stream.share), seconds(stream.busy_seconds),
            size(stream.bytes), _rate(stream),
            MISSING if stream.bound_seconds is None else seconds(stream.bound_seconds),
            ratio(stream.bound_seconds, stream.busy_seconds),
        )
        for p in suite.policies
        for name, stream in p.streams.items()
    )  # fmt: skip
    columns = (
        "policy", "stream", "busy share", "busy time", "bytes moved", "rate while busy", "physical bound",
        "achieved / bound",
    )  # fmt: skip
    return Table(f"Busy time per stream ({suite.kinds})", columns, rows, names=2)


SAVINGS = {
    "prompt_tokens": "prompt tokens",
    "computed_tokens": "computed tokens",
    "computed_per_needed": "computed / needed tokens",
    "padding_tokens": "padding",
    "shared_tokens": "shared prefix tokens",
    "passes": "passes",
    "occupancy": "slot occupancy",
    "kv_bytes_saved": "KV cache saved",
}
"""Figures of the engine's record, under "savings", and their names in the report."""


def saving(key: str, value: float | None) -> Cell:
    """One of them as it is shown: bytes, a ratio or a number of tokens."""
    if value is None:
        return NOT_RECORDED
    if key == "kv_bytes_saved":
        return size(int(value))
    text = f"{value:.3f}" if key in ("computed_per_needed", "occupancy") else f"{value:,.0f}"
    return Number(text, value)


def memory_table(suite: Findings) -> Table:
    """Planned and used bytes per policy and tier against the budget."""
    rows = tuple(
        (
            suite.names[p.name], name, "none set" if tier.budget is None else size(tier.budget),
            size(tier.planned), size(tier.peak), ratio(tier.peak, tier.planned),
        )
        for p in suite.policies
        for name, tier in p.tiers.items()
    )  # fmt: skip
    columns = ("policy", "tier", "budget", "planned", "peak used", "used / planned")
    return Table(f"Memory ({suite.kinds})", columns, rows, names=2)


def used_table(suite: Findings) -> Table:
    """Planned against used, in few columns."""
    return memory_table(suite).part(f"Memory planned against used ({suite.kinds})", 0, 1, 3, 4, 5)


def placement_table(suite: Findings) -> Table:
    """Fractions device/host/disk, as requested and as achieved."""
    rows = []
    for policy in suite.policies:
        for kind in TENSOR_KINDS:
            if kind == "state" and kind not in policy.placement:  # of a model without any
                continue
            fractions = policy.placement.get(kind, {}).values()
            achieved = " / ".join(f"{part:.3g}" for part in fractions) or NOT_RECORDED
            asked = policy.definition.get(kind, NOT_RECORDED).replace("/", " / ")
            rows.append((suite.names[policy.name], kind.replace("kv", "KV cache"), asked, achieved))
    columns = ("policy", "what", "requested: device / host / disk", "achieved: device / host / disk")
    return Table(f"Placement ({suite.kinds})", columns, tuple(rows), names=2)


def facts_table(
    title: str, policies: Sequence[PolicyResult], facts: Callable[[PolicyResult], Mapping[str, str]]
) -> Table:
    """Facts as rows; one column where all policies agree, else a column per policy."""
    keys = list(dict.fromkeys(key for policy in policies for key in facts(policy)))
    rows = [(key, [facts(policy).get(key, NOT_RECORDED) for policy in policies]) for key in keys]
    if all(len(set(values)) == 1 for _, values in rows):
        return Table(title, ("", ""), tuple((key, Name(values[0])) for key, values in rows), names=2)
    columns = ("", *(marked(policy.name, index) for index, policy in enumerate(policies)))
    table = tuple((key, *map(Name, values)) for key, values in rows)
    return Table(title, columns, table, names=len(columns))
