"""All statistics of the harness: intervals of means, differences and ratios, tests, the gate's verdict.

It knows counts and arrays of numbers, one per instance, and nothing of policies or metrics. There is one
bootstrap: over instances, seeded, percentile intervals of 10,000 draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
DRAWS = 10_000
_CHUNK = 4_000_000
"""Most instances drawn at once, so that a bootstrap takes tens of megabytes."""

_FEW = 64
"""Up to this many different rows are drawn by their counts, which is the same and faster."""

_Z = NormalDist().inv_cdf(1 - ALPHA / 2)
_Z_POWER = NormalDist().inv_cdf(0.8)
_FEWEST = 6
"""Pairs that must differ, all one way, before McNemar's exact test is below 0.05."""

Numbers = Sequence[float] | NDArray[np.float64]


class Verdict(StrEnum):
    """What the gate says of a format."""

    REFERENCE = "reference"
    ACCEPTED = "accepted"
    """Its accuracy is at least the wanted part of full precision's, with 95 % confidence."""

    REJECTED = "rejected"
    """It is less, with 95 % confidence."""

    INCONCLUSIVE = "inconclusive"
    """The instances are too few to tell."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class Retained(Estimate):
    """Which part of the full-precision accuracy a format keeps, with one-sided 95 % bounds.

    The value is NaN where full precision has an accuracy of 0.
    """

    def verdict(self, accept: float) -> Verdict:
        """Whether it is at least ``accept``."""
        if self.low >= accept:
            return Verdict.ACCEPTED
        return Verdict.REJECTED if self.high < accept else Verdict.INCONCLUSIVE


@dataclass(frozen=True)
class Change(Estimate):
    """Mean of right less left over paired instances, with its 95 % interval and two-sided p."""

    p: float
    detectable: float
    """The minimum detectable effect: the smallest true difference found with a power of 0.8."""


def is_right_or_wrong(values: Numbers) -> bool:
    """Whether there are values, and every one is 0 or 1."""
    return len(values) > 0 and all(value in (0.0, 1.0) for value in values)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (E. B. Wilson, 1927)."""
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(1 - ALPHA, method="wilson")
    return float(found.low), float(found.high)


def mean(values: Numbers) -> Estimate:
    """A mean with Wilson's interval where every value is 0 or 1, otherwise the bootstrap's."""
    if is_right_or_wrong(values):
        return Estimate(sum(values) / len(values), *wilson(round(sum(values)), len(values)))
    return ratio(values, np.ones(len(values)))


def ratio(numerators: Numbers, denominators: Numbers) -> Estimate:
    """Ratio of two sums over the same items, with the bootstrap's interval; NaN where nothing is below."""
    columns = np.stack([np.asarray(c, dtype=np.float64) for c in (numerators, denominators)], axis=1)
    above, below = columns.sum(axis=0)
    if not below:
        return Estimate(math.nan, math.nan, math.nan)
    low, high = np.quantile(_ratios(columns), (ALPHA / 2, 1 - ALPHA / 2))
    return Estimate(float(above / below), float(low), float(high))


def difference(mine: Numbers, reference: Numbers, weights: Numbers | None = None) -> Estimate:
    """Mean of ``mine - reference`` over paired items, with the bootstrap's interval.

    Args:
        weights: an item's weight in the mean, such as the tokens of an answer; by default all are 1.
    """
    change = np.asarray(mine, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    weight = np.ones_like(change) if weights is None else np.asarray(weights, dtype=np.float64)
    return ratio(change * weight, weight)


def retained(mine: Numbers, reference: Numbers) -> Retained:
    """Ratio of two accuracies over the same instances, with bounds that few instances cannot fool.

    A bootstrap takes agreement on a handful of instances for certainty, since it draws nothing else. So one
    more instance is put among those that are drawn from: for the lower bound one that full precision has
    right and the format wrong, for the upper bound one that both have right. Where a format loses none of n
    instances the lower bound thus is about 1 - 3/n, as by the rule of three.
    """
    pairs = np.stack([np.asarray(mine, dtype=np.float64), np.asarray(reference, dtype=np.float64)], axis=1)
    total = pairs.sum(axis=0)
    if not total[1] > 0:
        return Retained(math.nan, 0.0, math.inf)
    low = np.quantile(_ratios(np.vstack([pairs, (0.0, 1.0)])), 0.05)
    high = np.quantile(_ratios(np.vstack([pairs, (1.0, 1.0)])), 0.95)
    return Retained(float(total[0] / total[1]), float(low), float(high))


def mcnemar(only_left: int, only_right: int) -> float:
    """Exact two-sided p of McNemar's test (Q. McNemar, 1947): are the pairs that differ split evenly?

    Args:
        only_left: pairs that only the left one has right.
        only_right: pairs that only the right one has right.
    """
    from scipy.stats import binomtest

    total = only_left + only_right
    return float(binomtest(only_left, total).pvalue) if total else 1.0


def paired_interval(only_left: int, only_right: int, pairs: int) -> tuple[float, float]:
    """95 % interval of a difference of paired proportions, right less left.

    The adjusted Wald interval of D. G. Bonett and R. M. Price (2012): one more pair of each kind that
    differs, so that a handful of pairs which agree is not taken for certainty.
    """
    gained, lost = (only_right + 1) / (pairs + 2), (only_left + 1) / (pairs + 2)
    half = _Z * math.sqrt((gained + lost - (gained - lost) ** 2) / (pairs + 2))
    return max(-1.0, gained - lost - half), min(1.0, gained - lost + half)


def minimum_detectable_effect(pairs: int, discordant: float) -> float:
    """The smallest difference of two accuracies that McNemar's test finds with a power of 0.8.

    R. J. Connor's sample size (1987) solved for the difference; never less than six pairs, without which
    the exact test cannot reject at all.

    Args:
        pairs: instances that both answered.
        discordant: part of them on which the two differ, as far as known; above 0.
    """
    from scipy.optimize import brentq

    def excess(effect: float) -> float:
        rate = max(discordant, effect)  # a difference of d needs d of the pairs to differ
        needed = _Z * math.sqrt(rate) + _Z_POWER * math.sqrt(max(0.0, rate - effect * effect))
        return math.sqrt(pairs) * effect - needed

    if excess(1.0) <= 0:
        return 1.0
    return float(min(1.0, max(brentq(excess, 0.0, 1.0), _FEWEST / pairs)))


def compare_right_wrong(both: int, only_left: int, only_right: int, neither: int) -> Change:
    """Compare two policies whose answers are each right or wrong."""
    pairs = both + only_left + only_right + neither
    interval = paired_interval(only_left, only_right, pairs)
    detectable = minimum_detectable_effect(pairs, (only_left + only_right + 1) / (pairs + 2))
    return Change((only_right - only_left) / pairs, *interval, mcnemar(only_left, only_right), detectable)


def compare_values(left: Numbers, right: Numbers) -> Change:
    """Compare two policies by any figure per instance: the bootstrap over pairs."""
    changes = np.asarray(right, dtype=np.float64) - np.asarray(left, dtype=np.float64)
    means = _resampled_sums(changes[:, None])[:, 0] / len(changes)
    low, high = np.quantile(means, (ALPHA / 2, 1 - ALPHA / 2))
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    spread = float(changes.std(ddof=1)) if len(changes) > 1 else 0.0
    detectable = (_Z + _Z_POWER) * spread / math.sqrt(len(changes))
    return Change(float(changes.mean()), float(low), float(high), min(1.0, 2 * tail), detectable)


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p values, corrected for their number (S. Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    raised = [min(1.0, p_values[index] * (len(order) - rank)) for rank, index in enumerate(order)]
    corrected = dict(zip(order, accumulate(raised, max), strict=True))
    return [corrected[index] for index in range(len(order))]


def _ratios(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Resampled first column over the second; a draw with nothing in the second counts as 0."""
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
