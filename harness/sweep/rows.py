"""The rows of a curve: every format's figures beside full precision's, intervals, and the gate's verdict.

It knows measured points and statistics; how rows are shown is another module's matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from statistics import median
from typing import Any

from engine.errors import UsageError
from engine.spec.format_key import format_key
from engine.spec.policy import Policy
from engine.spec.precision import MatmulPrecision
from harness.statistics import Estimate, Verdict, difference, mean, retained
from harness.sweep.points import Likelihood, Point


@dataclass(frozen=True)
class FormatRow:
    """One format. What was not measured is None."""

    format: str
    weight_quant: str
    kv_quant: str
    attention_fraction: float
    calibration: str
    weight_bits: float
    """Bits per weight as stored, those that are not packed included."""

    kv_bits: float
    """Bits per value of the KV cache as stored, exact newest tokens included."""

    bits: float
    """Bits per value of the weights and the KV cache of one block together."""

    bytes_per_parameter: float
    kv_bytes_per_token: float
    largest_block: int
    """Sequences that fit the memory budgets."""

    tokens_per_second: float | None
    slowest: float | None
    fastest: float | None
    """Generated tokens per second: the median of the rounds, and their range."""

    repeats: int
    speed_began: str
    """When the rounds began; formats with the same time were measured in turn."""

    other_cores: float | None
    """Most cores that other processes kept busy while a round was measured; None where it is not known."""

    matmul_precision: str = MatmulPrecision.HIGHEST.value
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    """Mean over all instances of the run entries whose metric is an accuracy, with its 95 % interval."""

    instances: int = 0
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    """Accuracy less that of full precision; paired bootstrap."""

    retained: float | None = None
    retained_low: float | None = None
    """Accuracy as a part of full precision's, and the one-sided lower 95 % bound that the gate goes by."""

    verdict: Verdict = Verdict.INCONCLUSIVE
    cheapest: bool = False
    """Whether no accepted format takes fewer bits."""

    answer_nll: float | None = None
    answer_nll_change: float | None = None
    answer_nll_change_low: float | None = None
    answer_nll_change_high: float | None = None
    """Nats per token of correct answers, and what they are more than at full precision."""

    answer_tokens: int = 0
    perplexity: float | None = None
    text_bits_per_token: float | None = None
    text_nll_change: float | None = None
    text_nll_change_low: float | None = None
    text_nll_change_high: float | None = None
    text_tokens: int = 0
    last_word_accuracy: float | None = None
    last_word_low: float | None = None
    last_word_high: float | None = None
    last_word_nll: float | None = None
    """Nats per last word."""

    passages: int = 0
    kl: float | None = None
    agreement: float | None = None
    compared_tokens: int = 0
    kind: str = "measured"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without numbers that JSON lacks."""
        lacking = {key: None for key, value in asdict(self).items() if value != value or value == math.inf}
        return asdict(self) | lacking


def make_rows(points: Sequence[Point], accept: float) -> list[FormatRow]:
    """Compare formats with full precision.

    Args:
        points: full precision first.
        accept: part of its accuracy that an accepted format keeps.

    Raises:
        UsageError: if a format answered other instances than full precision.
    """
    reference = points[0]
    rows = [_row(point, reference, accept) for point in points]
    accepted = [row.bits for row in rows if row.verdict is Verdict.ACCEPTED]
    best = min(accepted, default=None)
    first = next((row for row in rows if row.verdict is Verdict.ACCEPTED and row.bits == best), None)
    return [replace(row, cheapest=row is first) for row in rows]


def _row(point: Point, reference: Point, accept: float) -> FormatRow:
    storage, speed = point.storage, point.speed
    rates, others = (speed.rates, speed.others) if speed else ((), ())
    row = FormatRow(
        format=point.name,
        **format_key(Policy.from_mapping(point.policy))._asdict(),
        weight_bits=storage.weight_bits,
        kv_bits=storage.kv_bits,
        bits=storage.bits,
        bytes_per_parameter=storage.weight_bytes / storage.parameters,
        kv_bytes_per_token=storage.kv_bytes_per_token,
        largest_block=storage.largest_block,
        tokens_per_second=median(rates) if rates else None,
        slowest=min(rates, default=None),
        fastest=max(rates, default=None),
        repeats=len(rates),
        speed_began=speed.began if speed else "",
        other_cores=max(others, default=None),
        verdict=Verdict.REFERENCE if point is reference else Verdict.INCONCLUSIVE,
    )
    return replace(row, **_accuracy(point, reference, accept), **_likelihoods(point, reference))


def _accuracy(point: Point, reference: Point, accept: float) -> dict[str, Any]:
    mine, full = _values(point), _values(reference)
    if mine.keys() != full.keys():
        raise UsageError(
            f"format {point.name} answered other instances than {reference.name}: give another --suite"
        )
    if not mine:
        return {}
    values, base = list(mine.values()), [full[key] for key in mine]
    found = {**_named("accuracy", mean(values)), "instances": len(values)}
    if point is reference:
        return {**found, "change": 0.0, "retained": 1.0}
    kept = retained(values, base)
    found |= {"retained": kept.value, "retained_low": kept.low, "verdict": kept.verdict(accept)}
    return found | _named("change", difference(values, base))


def _likelihoods(point: Point, reference: Point) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if answers := point.answers:
        found |= {"answer_nll": answers.per_token, "answer_tokens": sum(answers.tokens)}
        found |= _named("answer_nll_change", _nll_change(answers, reference.answers))
    if text := point.text:
        found |= {
            "perplexity": math.exp(min(text.per_token, 700)),
            "text_bits_per_token": text.per_token / math.log(2),
            "text_tokens": sum(text.tokens),
            **_named("text_nll_change", _nll_change(text, reference.text)),
        }
    if words := point.last_words:
        right = mean([float(greedy) for greedy in words.greedy])
        found |= {"last_word_accuracy": right.value, "last_word_low": right.low, "last_word_high": right.high}
        found |= {"last_word_nll": sum(words.nll) / len(words.nll), "passages": len(words.greedy)}
    if point.divergence is not None:
        kl, agreement, positions = astuple(point.divergence)
        found |= {"kl": kl, "agreement": agreement, "compared_tokens": positions}
    return found


def _named(name: str, found: Estimate) -> dict[str, Any]:
    """An estimate as the fields of a row."""
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _values(point: Point) -> dict[tuple[str, str], float]:
    """By run entry and instance, of the entries whose metric is an accuracy."""
    return {
        (entry.entry, instance): value
        for entry in point.entries
        if entry.is_accuracy
        for instance, value in entry.values.items()
    }


def _nll_change(mine: Likelihood, reference: Likelihood | None) -> Estimate:
    """Per token, with an interval over the items."""
    assert reference is not None, "the same items were asked"
    per_token = [nll / tokens for nll, tokens in zip(mine.nll, mine.tokens, strict=True)]
    base = [nll / tokens for nll, tokens in zip(reference.nll, reference.tokens, strict=True)]
    return difference(per_token, base, weights=mine.tokens)
