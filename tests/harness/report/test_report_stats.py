"""The statistics of paired policies equal scipy's, and say no more than the instances can."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.report.analysis.stats import (
    compare_right_wrong,
    compare_values,
    holm,
    mcnemar,
    paired_interval,
    smallest_difference,
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(left: int, right: int) -> None:
    expected = stats.binomtest(left, left + right, 0.5).pvalue if left + right else 1.0
    assert mcnemar(left, right) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_thousands_of_pairs() -> None:
    assert mcnemar(5_200, 4_800) == pytest.approx(stats.binomtest(4_800, 10_000).pvalue, rel=1e-8)
    assert 0 < mcnemar(0, 1_000) < 1e-300 or mcnemar(0, 1_000) == pytest.approx(2 * 0.5**1000)


def test_interval_of_pairs_covers() -> None:
    """Of many draws with a known difference, 95 % of the intervals hold it; never far fewer."""
    generator = np.random.default_rng(1)
    for chances in ((0.6, 0.1, 0.05, 0.25), (0.9, 0.02, 0.02, 0.06)):
        true = chances[2] - chances[1]
        drawn = generator.multinomial(80, chances, size=4000)
        held = [
            low <= true <= high for low, high in (paired_interval(int(b), int(c), 80) for _, b, c, _ in drawn)
        ]
        assert np.mean(held) > 0.94


def test_agreement_on_a_few_is_not_certainty() -> None:
    change = compare_right_wrong(5, 0, 0, 5)
    assert change.value == 0 and change.low < -0.2 and change.high > 0.2 and change.p == 1
    assert change.detectable == pytest.approx(0.6, abs=0.11), "ten instances need six that differ"


@pytest.mark.parametrize(("pairs", "discordant"), [(200, 0.2), (1000, 0.05), (450, 0.1)])
def test_smallest_difference_has_the_power_it_claims(pairs: int, discordant: float) -> None:
    found = smallest_difference(pairs, discordant)
    rate = max(discordant, found)
    generator = np.random.default_rng(2)
    differing = generator.binomial(pairs, rate, size=3000)
    gained = generator.binomial(differing, (rate + found) / (2 * rate))
    power = np.mean([mcnemar(int(d - g), int(g)) < 0.05 for d, g in zip(differing, gained, strict=True)])
    assert 0.7 < power < 0.9


def test_bootstrap_of_pairs_is_scipys() -> None:
    generator = np.random.default_rng(3)
    left = generator.normal(0.5, 0.2, size=120)
    right = left + generator.normal(0.03, 0.1, size=120)
    change = compare_values(left, right)
    theirs = stats.bootstrap(
        (right - left,), np.mean, n_resamples=10_000, method="percentile", rng=generator
    ).confidence_interval
    assert change.value == pytest.approx(float((right - left).mean()))
    assert (change.low, change.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)
    assert change.p == pytest.approx(stats.ttest_rel(right, left).pvalue, abs=0.01)
    spread = float((right - left).std(ddof=1))
    wanted = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * spread / math.sqrt(120)
    assert change.detectable == pytest.approx(wanted)


def test_holm_corrects_as_published() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
