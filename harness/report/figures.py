"""Every figure of a report as tidy rows, for spreadsheets and notebooks: CSV and Parquet.

It knows suites and evidence. One row is one figure: whose it is, what it is called, its value with its
interval where it has one, its unit, the number of instances, and whether it was measured or simulated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING

from harness.report.analysis.findings import Findings
from harness.report.evidence import Evidence
from harness.report.inputs.data import PolicyResult, Result

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class FigureRow:
    """One figure; what does not apply is empty, what was not recorded has no row."""

    suite: str
    section: str
    policy: str
    run_entry: str = ""
    figure: str = ""
    value: float = math.nan
    low: float | None = None
    high: float | None = None
    """The 95 % interval, or the spread over repeats of a ratio."""

    unit: str = ""
    instances: int | None = None
    against: str = ""
    """The other policy or system of a comparison."""

    kind: str = "measured"


def figures(suite: Findings | None, evidence: Evidence) -> list[FigureRow]:
    """All of them, in the order of the report."""
    own: Iterable[FigureRow] = ()
    if suite is not None:
        policies = (row for policy in suite.policies for row in _policy(suite.suite, policy))
        own = (*_accuracies(suite), *policies, *_compared(suite, evidence))
    return [*own, *_bits(evidence), *_systems(evidence)]


def _found(about: FigureRow, listed: Iterable[tuple[str, float | None, str]]) -> Iterator[FigureRow]:
    """Rows like ``about`` for those of (figure, value, unit) that were recorded."""
    for figure, value, unit in listed:
        if value is not None:
            yield replace(about, figure=figure, value=value, unit=unit)


def _throughput(run: Result | PolicyResult) -> list[tuple[str, float | None, str]]:
    return [
        ("generated_tokens_per_s", run.generated_per_second, "token/s"),
        ("total_tokens_per_s", run.total_per_second, "token/s"),
        ("requests", run.requests, ""),
        *([("passes", run.passes, "")] if isinstance(run, PolicyResult) else []),
        ("prompt_tokens", run.prompt_tokens, "token"),
        ("generated_tokens", run.generated_tokens, "token"),
        ("seconds", run.seconds, "s"),
    ]


def _accuracies(suite: Findings) -> Iterator[FigureRow]:
    for r in suite.results:
        about = FigureRow(suite.suite, "accuracy", r.policy, r.run_entry, r.metric, kind=r.kind)
        if r.value is not None:
            yield replace(about, value=r.value, low=r.low, high=r.high, instances=r.instances)
        yield from _found(replace(about, section="throughput"), _throughput(r))
    for policy in suite.policies:
        if mean := suite.means.get(policy.name):
            about = FigureRow(suite.suite, "accuracy", policy.name, kind=policy.kind)
            yield replace(about, figure="mean_accuracy", **asdict(mean))


def _policy(suite: str, p: PolicyResult) -> Iterator[FigureRow]:
    listed: dict[str, list[tuple[str, float | None, str]]] = {
        "throughput": [*_throughput(p), ("load_seconds", p.load_seconds, "s")],
        "streams": [
            (f"{name}_{what}", value, unit)
            for name, stream in p.streams.items()
            for what, value, unit in (
                ("share", stream.share, ""), ("busy", stream.busy_seconds, "s"),
                ("bytes", stream.bytes, "B"), ("bound", stream.bound_seconds, "s"),
            )
        ],
        "memory": [
            (f"{name}_{what}", value, "B")
            for name, tier in p.tiers.items()
            for what, value in asdict(tier).items()
        ],
        "placement": [
            (f"{tensor}_{tier}", part, "")
            for tensor, tiers in p.placement.items()
            for tier, part in tiers.items()
        ],
    }  # fmt: skip
    for section, found in listed.items():
        yield from _found(FigureRow(suite, section, p.name, kind=p.kind), found)
    about = FigureRow(suite, "predicted", p.name, kind="projected")
    yield from _found(about, ((figure, value, "") for figure, value in p.predicted.items()))


def _compared(suite: Findings, evidence: Evidence) -> Iterator[FigureRow]:
    for paired in evidence.paired:
        change = paired.change
        about = FigureRow(
            suite.suite, "paired", paired.right, paired.entry,
            instances=paired.instances, against=paired.left, kind=suite.kinds,
        )  # fmt: skip
        yield replace(about, figure="change", value=change.value, low=change.low, high=change.high)
        listed = (
            ("p", change.p), ("p_corrected", paired.corrected), ("smallest_detectable", change.detectable),
            ("only_against_right", paired.only_left), ("only_policy_right", paired.only_right),
        )  # fmt: skip
        yield from _found(about, ((figure, value, "") for figure, value in listed))
    for standing in evidence.standings:
        latencies = (("latency_median", standing.latency, "s"), ("latency_p95", standing.slow_latency, "s"))
        yield from _found(FigureRow(suite.suite, "latency", standing.policy, kind=suite.kinds), latencies)


def _bits(evidence: Evidence) -> Iterator[FigureRow]:
    for bits in evidence.bits:
        for point in bits.points:
            about = FigureRow(bits.source, "bits", point.name, kind=bits.kind)
            yield from _found(about, (
                ("weight_bits", point.weight_bits, "bit"), ("kv_bits", point.kv_bits, "bit"),
                ("bits", point.bits, "bit"), ("perplexity", point.perplexity, ""), ("kl", point.kl, "nat"),
                ("agreement", point.agreement, ""),
            ))  # fmt: skip
            for entry, mean in (("", point.accuracy), *point.entries):
                if mean is not None:
                    yield replace(about, run_entry=entry, figure="accuracy", **asdict(mean))


def _systems(evidence: Evidence) -> Iterator[FigureRow]:
    for one in evidence.systems:
        for a in one.ratios:
            about = FigureRow(one.name, "comparison", a.mine.name, against=a.theirs.name)
            ratio, figure = a.ratio, f"ratio, {a.setting}"
            yield replace(about, figure=figure, value=ratio.median, low=ratio.least, high=ratio.most)


def to_csv(rows: Sequence[FigureRow]) -> str:
    """One line per figure, with a head. A text that a spreadsheet would compute gets an apostrophe."""

    def inert(text: str) -> str:
        return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text

    frame = _frame(rows)
    texts = frame.select_dtypes("object").columns
    frame[texts] = frame[texts].map(inert)
    return str(frame.to_csv(index=False, lineterminator="\n"))


def to_parquet(rows: Sequence[FigureRow]) -> bytes:
    """The same as Parquet."""
    return bytes(_frame(rows).to_parquet(index=False))


def _frame(rows: Sequence[FigureRow]) -> DataFrame:
    from pandas import DataFrame

    texts = [field.name for field in fields(FigureRow) if field.type == "str"]
    frame = DataFrame([asdict(row) for row in rows], columns=[field.name for field in fields(FigureRow)])
    frame[texts] = frame[texts].map(lambda text: text.encode("utf-8", "replace").decode())
    return frame.astype({"value": float, "low": float, "high": float, "instances": "Int64"})
