"""Every figure of a report as tidy rows, for spreadsheets and notebooks: CSV and Parquet.

It knows suites and evidence. One row is one figure: whose it is, what it is called, its value with its
interval where it has one, its unit, the number of instances, and whether it was measured or simulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from harness.report.analysis.findings import Findings
from harness.report.evidence import Evidence
from harness.report.inputs.data import PolicyRun

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class FigureRow:
    """One figure; what does not apply is empty, what was not recorded has no row."""

    suite: str
    section: str
    policy: str
    run_entry: str
    figure: str
    value: float
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
    if suite is None:
        return [*_bits(evidence), *_systems(evidence)]
    name = suite.suite
    found = [*_accuracies(suite), *(row for p in suite.policies for row in _policy(name, p))]
    kind = suite.kinds
    for paired in evidence.paired:
        about: dict[str, Any] = {"suite": name, "section": "paired", "policy": paired.right,
                 "run_entry": paired.entry,
                 "instances": paired.instances, "against": paired.left, "kind": kind}  # fmt: skip
        change = paired.change
        found.append(
            FigureRow(figure="change", value=change.value, low=change.low, high=change.high, **about)
        )  # type: ignore[arg-type]
        for figure, value in (
            ("p", change.p), ("p_corrected", paired.corrected), ("smallest_detectable", change.detectable),
            ("only_against_right", paired.only_left), ("only_policy_right", paired.only_right),
        ):  # fmt: skip
            if value is not None:
                found.append(FigureRow(figure=figure, value=value, **about))
    for standing in evidence.standings:
        for figure, latency in (("latency_median", standing.latency), ("latency_p95", standing.slow_latency)):
            if latency is not None:
                found.append(
                    FigureRow(name, "latency", standing.policy, "", figure, latency, unit="s", kind=kind)
                )
    return [*found, *_bits(evidence), *_systems(evidence)]


def _accuracies(suite: Findings) -> Iterator[FigureRow]:
    for r in suite.results:
        about = (suite.suite, "accuracy", r.policy, r.run_entry)
        if r.value is not None:
            yield FigureRow(*about, r.metric, r.value, r.low, r.high, "", r.instances, kind=r.kind)
        for figure, value, unit in (
            ("generated_tokens_per_s", r.generated_per_second, "token/s"),
            ("total_tokens_per_s", r.total_per_second, "token/s"), ("requests", r.requests, ""),
            ("prompt_tokens", r.prompt_tokens, "token"), ("generated_tokens", r.generated_tokens, "token"),
            ("seconds", r.seconds, "s"),
        ):  # fmt: skip
            if value is not None:
                yield FigureRow(
                    suite.suite, "throughput", r.policy, r.run_entry, figure, value, unit=unit, kind=r.kind
                )
    for policy in suite.policies:
        mean = suite.means.get(policy.name)
        if mean:
            about = (suite.suite, "accuracy", policy.name, "")
            yield FigureRow(*about, "mean_accuracy", mean.value, mean.low, mean.high, kind=policy.kind)


def _policy(suite: str, p: PolicyRun) -> Iterator[FigureRow]:
    listed: list[tuple[str, str, float | None, str]] = [
        ("throughput", "generated_tokens_per_s", p.generated_per_second, "token/s"),
        ("throughput", "total_tokens_per_s", p.total_per_second, "token/s"),
        ("throughput", "requests", p.requests, ""),
        ("throughput", "passes", p.passes, ""),
        ("throughput", "prompt_tokens", p.prompt_tokens, "token"),
        ("throughput", "generated_tokens", p.generated_tokens, "token"),
        ("throughput", "seconds", p.seconds, "s"),
        ("throughput", "load_seconds", p.load_seconds, "s"),
    ]
    for stream in p.streams:
        listed += [
            ("streams", f"{stream.stream}_share", stream.share, ""),
            ("streams", f"{stream.stream}_busy", stream.busy_seconds, "s"),
            ("streams", f"{stream.stream}_bytes", stream.bytes, "B"),
            ("streams", f"{stream.stream}_bound", stream.bound_seconds, "s"),
        ]
    for tier in p.tiers:
        listed += [
            ("memory", f"{tier.tier}_budget", tier.budget, "B"),
            ("memory", f"{tier.tier}_planned", tier.planned, "B"),
            ("memory", f"{tier.tier}_peak", tier.peak, "B"),
        ]
    listed += [
        ("placement", f"{tensor}_{tier}", part, "")
        for tensor, tiers in p.placement.items()
        for tier, part in tiers.items()
    ]
    for section, figure, value, unit in listed:
        if value is not None:
            yield FigureRow(suite, section, p.name, "", figure, value, unit=unit, kind=p.kind)
    for figure, value in p.predicted.items():
        yield FigureRow(suite, "predicted", p.name, "", figure, value, kind="projected")


def _bits(evidence: Evidence) -> Iterator[FigureRow]:
    for bits in evidence.bits:
        for point in bits.points:
            about = (bits.source, "bits", point.name)
            for figure, value, unit in (
                ("weight_bits", point.weight_bits, "bit"), ("kv_bits", point.kv_bits, "bit"),
                ("bits", point.bits, "bit"), ("perplexity", point.perplexity, ""), ("kl", point.kl, "nat"),
                ("agreement", point.agreement, ""),
            ):  # fmt: skip
                if value is not None:
                    yield FigureRow(*about, "", figure, value, unit=unit, kind=bits.kind)
            for entry, mean in (("", point.accuracy), *point.entries):
                if mean is not None:
                    yield FigureRow(
                        *about, entry, "accuracy", mean.value, mean.low, mean.high, kind=bits.kind
                    )


def _systems(evidence: Evidence) -> Iterator[FigureRow]:
    for one in evidence.systems:
        for a in one.ratios:
            yield FigureRow(
                one.name, "comparison", a.mine.name, "", f"ratio, {a.setting}", a.ratio.median, a.ratio.least,
                a.ratio.most,
                against=a.theirs.name,
            )  # fmt: skip


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
