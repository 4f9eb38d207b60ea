"""Statistics of two policies on the same instances: is a difference real, could one have been seen.

It knows counts and arrays of numbers, and nothing of policies or metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.statistics import Numbers, resampled_means

_Z = 1.959963984540054  # 97.5 % point of the normal distribution
_Z_POWER = 0.8416212335729143  # 80 % point
ALPHA = 0.05
POWER = 0.8
_FEWEST = 6
"""So many pairs must differ, all one way, before McNemar's exact test is below 0.05."""


@dataclass(frozen=True)
class Change:
    """Mean of right less left over paired instances, with its 95 % interval and two-sided p."""

    value: float
    low: float
    high: float
    p: float
    detectable: float
    """The smallest true difference that so many instances show four times in five."""


def mcnemar(only_left: int, only_right: int) -> float:
    """Exact two-sided p of McNemar's test (Q. McNemar, 1947): are the pairs that differ split evenly?

    Args:
        only_left: pairs that only the left one has right.
        only_right: pairs that only the right one has right.
    """
    total, fewer = only_left + only_right, min(only_left, only_right)
    if not total:
        return 1.0
    # Sum of binomials by their logarithms: exact to rounding, and safe for thousands of pairs.
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value - total * math.log(2)) for value in logs))


def paired_interval(only_left: int, only_right: int, pairs: int) -> tuple[float, float]:
    """95 % interval of a difference of paired proportions, right less left.

    The adjusted Wald interval of D. G. Bonett and R. M. Price (2012): one more pair of each kind that
    differs, so that a handful of pairs which agree is not taken for certainty.
    """
    gained, lost = (only_right + 1) / (pairs + 2), (only_left + 1) / (pairs + 2)
    half = _Z * math.sqrt((gained + lost - (gained - lost) ** 2) / (pairs + 2))
    return max(-1.0, gained - lost - half), min(1.0, gained - lost + half)


def smallest_difference(pairs: int, discordant: float) -> float:
    """The smallest difference of two accuracies that McNemar's test finds with a power of 0.8.

    R. J. Connor's sample size (1987) solved for the difference; never less than six pairs, without which
    the exact test cannot reject at all.

    Args:
        pairs: instances that both answered.
        discordant: part of them on which the two differ, as far as known.
    """
    if not pairs:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        rate = max(discordant, middle)  # a difference of d needs d of the pairs to differ
        needed = _Z * math.sqrt(rate) + _Z_POWER * math.sqrt(max(0.0, rate - middle * middle))
        low, high = (middle, high) if math.sqrt(pairs) * middle < needed else (low, middle)
    return min(1.0, max(high, _FEWEST / pairs))


def compare_right_wrong(both: int, only_left: int, only_right: int, neither: int) -> Change:
    """Compare two policies whose answers are each right or wrong."""
    pairs = both + only_left + only_right + neither
    low, high = paired_interval(only_left, only_right, pairs)
    differing = (only_left + only_right + 1) / (pairs + 2)
    return Change(
        (only_right - only_left) / pairs,
        low,
        high,
        mcnemar(only_left, only_right),
        smallest_difference(pairs, differing),
    )


def compare_values(left: Numbers, right: Numbers) -> Change:
    """Compare two policies by any figure per instance: percentile bootstrap over pairs, 10,000 draws."""
    import numpy as np

    changes = np.asarray(right, dtype=np.float64) - np.asarray(left, dtype=np.float64)
    means = resampled_means(changes)
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    spread = float(changes.std(ddof=1)) if len(changes) > 1 else 0.0
    detectable = (_Z + _Z_POWER) * spread / math.sqrt(len(changes))
    return Change(float(changes.mean()), float(low), float(high), min(1.0, 2 * tail), detectable)


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p values, corrected for their number (S. Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected
