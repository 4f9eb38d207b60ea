"""How many bits each policy or format keeps, and what that does to accuracy and to distributions.

It knows a suite's policies and, where one was swept, the curve of the same name (`harness.sweep.runner`); it
does not know how points are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import PolicyError
from engine.spec.kv_format import KVFormat
from engine.spec.weight_formats import EXACT, WeightFormats
from harness.report.analysis.findings import Findings
from harness.report.content import MISSING, Cell, Mean, Name, Number, Table, fraction, with_interval
from harness.report.inputs.data import PolicyResult
from harness.report.inputs.json_file import Document

SERIES = ("weights", "KV cache", "both")
"""What a format compresses; the reference, which compresses nothing, belongs to none."""

MARKS = (0.99, 0.999)
"""Parts of full precision's accuracy that MLPerf's two quality targets ask for."""

_FULL = 32.0
"""Bits of the KV cache where it is kept as it is computed, in float32."""


@dataclass(frozen=True)
class BitPoint:
    """One policy or format."""

    name: str
    series: str | None
    """What it compresses; None of the reference."""

    weight_bits: float | None
    kv_bits: float | None
    bits: float | None
    """Per value: of weights, of the KV cache, of both together. None where it is not known."""

    accuracy: Mean | None
    entries: tuple[tuple[str, Mean], ...] = ()
    """By run entry."""

    answer_nll: Mean | None = None
    """Nats per token of correct answers; the interval is that of the change from full precision."""

    perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None
    verdict: str = ""
    """Of the curve's gate; empty where there is none."""

    cheapest: bool = False
    """Whether the gate accepts nothing with fewer bits."""

    @property
    def x(self) -> float | None:
        """The bits of what it compresses."""
        return {"weights": self.weight_bits, "KV cache": self.kv_bits}.get(self.series or "", self.bits)


@dataclass(frozen=True)
class Bits:
    """All points of one source, the reference first."""

    source: str
    """Where they come from, in words."""

    kind: str
    points: tuple[BitPoint, ...]
    instances: str = ""

    @property
    def reference(self) -> BitPoint:
        """Full precision."""
        return self.points[0]

    @property
    def entries(self) -> list[str]:
        """Run entries with an accuracy under the reference."""
        return [entry for entry, _ in self.reference.entries]


def read_curve(path: Path) -> Bits | None:
    """The points of a curve.json; None where there is none.

    Raises:
        UsageError: if it is damaged.
    """
    if not path.is_file():
        return None
    curve = Document.read(path)
    curve.check_schema()
    points = tuple(_curve_point(row) for row in curve.parts("rows"))
    if not points:
        raise curve.damage("rows", "is empty")
    instances = max(row.maybe("instances", row.count) or 0 for row in curve.parts("rows"))
    name = curve.maybe("suite", curve.text) or path.parent.name
    kind = curve.maybe("kind", curve.text) or "not recorded"
    return Bits(f"curve {name}", kind, points, f"{instances:,} instances")


def _curve_point(row: Document) -> BitPoint:
    weights = (row.maybe("weight_quant", row.text) or EXACT) != EXACT
    sparse = (row.maybe("attention_fraction", row.number) or 1.0) < 1
    kv = (row.maybe("kv_quant", row.text) or EXACT) != EXACT or sparse
    return BitPoint(
        name=row.text("format"),
        series=_series(weights, kv),
        weight_bits=row.maybe("weight_bits", row.number),
        kv_bits=row.maybe("kv_bits", row.number),
        bits=row.maybe("bits", row.number),
        accuracy=_mean(row, "accuracy", "accuracy_low", "accuracy_high"),
        entries=tuple(
            (entry.text("entry"), mean)
            for entry in (row.parts("entries") if "entries" in row.content else [])
            if entry.content.get("is_accuracy") and (mean := _mean(entry, "value", "low", "high"))
        ),
        answer_nll=_answer_nll(row),
        perplexity=row.maybe("perplexity", row.number),
        kl=row.maybe("kl", row.number),
        agreement=row.maybe("agreement", row.number),
        verdict=row.maybe("verdict", row.text) or "",
        cheapest=bool(row.content.get("cheapest")),
    )


def _answer_nll(row: Document) -> Mean | None:
    found = _mean(row, "answer_nll", "answer_nll_change_low", "answer_nll_change_high")
    if found is None or found.low is None or found.high is None:
        return found
    reference = found.value - (row.maybe("answer_nll_change", row.number) or 0.0)
    return Mean(found.value, reference + found.low, reference + found.high)


def _mean(part: Document, value: str, low: str, high: str) -> Mean | None:
    middle = part.maybe(value, part.number)
    if middle is None:
        return None
    return Mean(middle, part.maybe(low, part.number), part.maybe(high, part.number))


def of_suite(suite: Findings) -> Bits | None:
    """The points of a suite's own policies; None where no policy compresses, or none does not."""
    points = [_policy_point(suite, policy) for policy in suite.policies]
    references = [point for point in points if point.series is None]
    packed = [point for point in points if point.series is not None]
    if not references or not packed or references[0].accuracy is None:
        return None
    return Bits(f"suite {suite.suite}", suite.kinds, (references[0], *packed))


def _policy_point(suite: Findings, policy: PolicyResult) -> BitPoint:
    weights, kv = weight_bits(policy), kv_bits(policy)
    means = []
    for entry in suite.run_entries:
        result = suite.result(entry, policy.name)
        if result is not None and result.is_accuracy and result.value is not None:
            means.append((entry, Mean(result.value, result.low, result.high)))
    return BitPoint(
        name=policy.name,
        series=_series(*compresses(policy)),
        weight_bits=weights,
        kv_bits=kv,
        bits=_together(policy, weights, kv),
        accuracy=suite.means.get(policy.name),
        entries=tuple(means),
    )


def compresses(policy: PolicyResult) -> tuple[bool, bool]:
    """Whether a policy compresses weights, and whether the KV cache."""
    asked = policy.definition
    kv = asked.get("kv_quant", EXACT) != EXACT or float(asked.get("attention_fraction", 1)) < 1
    return asked.get("weight_quant", EXACT) != EXACT, kv


def weight_bits(policy: PolicyResult) -> float | None:
    """Bits per weight as stored, where it was recorded; else those of the format."""
    if "bytes_per_parameter" in policy.stored:
        return 8 * float(policy.stored["bytes_per_parameter"])
    try:
        form = WeightFormats.parse(policy.definition.get("weight_quant", EXACT)).default
    except PolicyError:
        return None
    if form is not None:
        return form.bits_per_value()
    return {"float32": 32.0}.get(policy.model.get("dtype", ""), 16.0)


def kv_bits(policy: PolicyResult) -> float | None:
    """Bits per value of the KV cache, as its format says; newest tokens that are kept exact not counted."""
    asked = policy.definition
    if asked.get("kv_quant", EXACT) != EXACT:
        try:
            form = KVFormat.parse(asked["kv_quant"])
        except PolicyError:
            return None
        return (form.keys.bits_per_value() + form.values.bits_per_value()) / 2
    return _FULL if policy.model.get("compute_dtype", "float32") == "float32" else 16.0


def _together(policy: PolicyResult, weights: float | None, kv: float | None) -> float | None:
    """Of weights and the KV cache of one block, by the bytes that are kept of each."""
    stored, asked = policy.stored, policy.definition
    if (
        weights is None
        or kv is None
        or not {"weight_bytes", "kv_bytes_per_token", "kv_tokens"} <= set(stored)
    ):
        return None if weights is None or kv is None else (weights + kv) / 2
    sequences = float(asked.get("device_batch", 1)) * float(asked.get("num_device_batches", 1))
    kv_bytes = float(stored["kv_bytes_per_token"]) * float(stored["kv_tokens"]) * sequences
    weight_bytes = float(stored["weight_bytes"])
    return (weight_bytes + kv_bytes) / (weight_bytes / weights + kv_bytes / kv)


def _series(weights: bool, kv: bool) -> str | None:
    return SERIES[2] if weights and kv else SERIES[0] if weights else SERIES[1] if kv else None


def bits_table(bits: Bits) -> Table:
    """Every point with its bits, its accuracy as a part of full precision's, and the distances."""
    full = bits.reference.accuracy
    rows: list[tuple[Cell, ...]] = []
    for point in bits.points:
        mean = point.accuracy
        kept = mean.value / full.value if mean and full and full.value else None
        rows.append((
            Name(point.name), point.series or "nothing",
            *(fraction(bits, 2) for bits in (point.weight_bits, point.kv_bits, point.bits)),
            *with_interval(mean),
            MISSING if kept is None else Number(f"{100 * kept:.1f} %", kept), _mark(kept),
            fraction(point.perplexity), fraction(point.kl, 4), fraction(point.agreement),
        ))  # fmt: skip
    columns = (
        "format", "compresses", "bits per weight", "bits per KV value", "bits of both", "accuracy",
        "95 % interval", "of full precision", "MLPerf mark", "perplexity", "mean KL, nats",
        "top-token agreement",
    )  # fmt: skip
    return Table(f"Accuracy against bits, {bits.source} ({bits.kind})", columns, tuple(rows), names=2)


def entries_table(bits: Bits) -> Table:
    """Accuracy by format and run entry."""
    rows = []
    for point in bits.points:
        by_entry = dict(point.entries)
        means = (by_entry.get(entry) for entry in bits.entries)
        rows.append((Name(point.name), fraction(point.x, 2), *(with_interval(mean)[0] for mean in means)))
    columns = ("format", "bits", *map(Name, bits.entries))
    return Table(f"Accuracy per run entry, {bits.source} ({bits.kind})", columns, tuple(rows))


def _mark(kept: float | None) -> str:
    if kept is None:
        return MISSING
    reached = [f"{100 * mark:g} %" for mark in MARKS if kept >= mark]
    return reached[-1] if reached else "below"


def points_at(points: Sequence[BitPoint], series: str) -> list[BitPoint]:
    """The points of one series that can be drawn, by bits."""
    found = [p for p in points if p.series == series and p.x is not None]
    return sorted(found, key=lambda point: point.x or 0.0)
