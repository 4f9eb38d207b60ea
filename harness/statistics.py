"""Statistics of a curve: intervals of paired differences and ratios, and the gate.

It knows arrays of numbers, one per instance, in the same order for a format and for full precision. The
bootstrap is over instances, seeded, with 10,000 draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
_CHUNK = 4_000_000
"""Most instances drawn at once, so that a bootstrap takes tens of megabytes."""

_FEW = 64
"""So many different rows are drawn by their counts, which is the same and faster."""

Numbers = Sequence[float] | NDArray[np.float64]


class Verdict(StrEnum):
    """What the gate says of a format."""

    REFERENCE = "reference"
    ACCEPTED = "accepted"
    """Its accuracy is at least the wanted part of full precision's, with 95 % confidence."""

    REJECTED = "rejected"
    """It is less, with 95 % confidence."""

    NOT_SHOWN = "not shown"
    """The instances are too few to tell."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Retained:
    """Which part of the full-precision accuracy a format keeps."""

    value: float
    """NaN where full precision has an accuracy of 0."""

    low: float
    """One-sided lower 95 % bound."""

    high: float
    """One-sided upper 95 % bound."""

    def verdict(self, accept: float) -> Verdict:
        """Whether it is at least ``accept``."""
        if self.low >= accept:
            return Verdict.ACCEPTED
        return Verdict.REJECTED if self.high < accept else Verdict.NOT_SHOWN


def difference(mine: Numbers, reference: Numbers, weights: Numbers | None = None) -> Estimate:
    """Mean of ``mine - reference`` over paired items, percentile bootstrap.

    Args:
        weights: an item's weight in the mean, such as the tokens of an answer; by default all are 1.
    """
    change = np.asarray(mine, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    weight = np.ones_like(change) if weights is None else np.asarray(weights, dtype=np.float64)
    columns = np.stack([change * weight, weight], axis=1)
    sums = _resampled_sums(columns)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    return Estimate(float(columns[:, 0].sum() / weight.sum()), float(low), float(high))


def resampled_means(values: Numbers) -> NDArray[np.float64]:
    """Means of items drawn with replacement; [DRAWS]."""
    column = np.asarray(values, dtype=np.float64)[:, None]
    return _resampled_sums(column)[:, 0] / len(column)


def retained(mine: Numbers, reference: Numbers) -> Retained:
    """Ratio of two accuracies over the same instances, with bounds that few instances cannot fool.

    A bootstrap makes certainty of agreement on a handful of instances, since it draws nothing else. So one
    more instance is put among those that are drawn from: for the lower bound one that full precision has
    right and the format wrong, for the upper bound one that both have right. Where a format loses none of n
    instances the lower bound thus is about 1 - 3/n, as by the rule of three, and fades with n otherwise.
    """
    pairs = np.stack([np.asarray(mine, dtype=np.float64), np.asarray(reference, dtype=np.float64)], axis=1)
    total = pairs.sum(axis=0)
    if not total[1] > 0:
        return Retained(math.nan, 0.0, math.inf)
    low = np.quantile(_ratios(np.vstack([pairs, (0.0, 1.0)])), 0.05)
    high = np.quantile(_ratios(np.vstack([pairs, (1.0, 1.0)])), 0.95)
    return Retained(float(total[0] / total[1]), float(low), float(high))


def _ratios(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Resampled ratios; a draw in which full precision has nothing right says nothing and counts as 0."""
    sums = _resampled_sums(pairs)
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(DRAWS), where=sums[:, 1] > 0)


def _resampled_sums(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of the columns [items, k] over items drawn with replacement; [DRAWS, k]."""
    generator = np.random.default_rng(0)
    count = len(columns)
    rows, times = np.unique(columns, axis=0, return_counts=True)
    if len(rows) <= _FEW:
        drawn = generator.multinomial(count, times / count, size=DRAWS)  # [DRAWS, rows]
        return np.asarray(drawn @ rows)
    step = max(1, _CHUNK // count)
    sums = [
        columns[generator.integers(count, size=(min(step, DRAWS - done), count))].sum(axis=1)
        for done in range(0, DRAWS, step)
    ]
    return np.concatenate(sums)
