"""Statistics against scipy and exact distributions, and a gate that needs enough instances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.statistics import (
    Retained,
    Verdict,
    compare_right_wrong,
    compare_values,
    difference,
    holm,
    mcnemar,
    mean,
    minimum_detectable_effect,
    paired_interval,
    ratio,
    retained,
    wilson,
)


def test_a_mean_has_one_interval_wherever_it_is_asked() -> None:
    assert mean([1.0] * 81 + [0.0] * 182) == mean([0.0] * 182 + [1.0] * 81)
    found = mean([1.0] * 81 + [0.0] * 182)
    assert (found.low, found.high) == wilson(81, 263) and found.value == pytest.approx(81 / 263)
    values = np.random.default_rng(5).normal(0.4, 0.2, size=150)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1)
    interval = theirs.confidence_interval
    found = mean(values)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.003)


def test_a_ratio_of_sums_resamples_its_items_as_pairs() -> None:
    generator = np.random.default_rng(6)
    below = generator.uniform(5, 20, size=120)
    above = below * generator.normal(0.8, 0.1, size=120)
    theirs = stats.bootstrap(
        (above, below), lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis), paired=True, vectorized=True,
        n_resamples=10_000, method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    found = ratio(above, below)
    assert found.value == pytest.approx(above.sum() / below.sum())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)
    assert math.isnan(ratio([1.0], [0.0]).value)


def answers(right: int, wrong: int) -> list[float]:
    return [1.0] * right + [0.0] * wrong


def test_a_difference_has_the_mean_and_the_spread_of_its_items() -> None:
    generator = np.random.default_rng(7)
    change = generator.normal(0.3, 2.0, size=500)
    found = difference(change, np.zeros(500))
    error = change.std() / math.sqrt(500)
    assert found.value == pytest.approx(change.mean())
    assert found.low == pytest.approx(change.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(change.mean() + 1.96 * error, abs=0.1 * error)


def test_a_difference_is_paired() -> None:
    base = np.random.default_rng(0).normal(0, 100, size=300)
    found = difference(base + 0.5, base)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_difference_is_weighted() -> None:
    assert difference([2.0, 0.0], [0.0, 0.0], weights=[1, 3]).value == pytest.approx(0.5)


def test_counts_and_draws_are_the_same_bootstrap() -> None:
    """Few distinct values are drawn by their counts; negligible jitter forces the other method."""
    mine, full = answers(170, 30), answers(190, 10)
    jitter = np.linspace(0, 1e-9, 200)
    counted, drawn = difference(mine, full), difference(np.array(mine) + jitter, full)
    assert (counted.low, counted.high) == pytest.approx((drawn.low, drawn.high), abs=0.006)


@pytest.mark.parametrize("count", [1, 2, 5, 20, 50, 200])
def test_agreement_on_few_instances_is_not_shown(count: int) -> None:
    found = retained(answers(count, 0), answers(count, 0))
    assert found.value == 1
    assert found.verdict(0.99) is Verdict.INCONCLUSIVE


def test_agreement_follows_the_rule_of_three() -> None:
    found = retained(answers(1000, 0), answers(1000, 0))
    assert found.low == pytest.approx(1 - 3 / 1000, abs=0.0011)
    assert found.verdict(0.99) is Verdict.ACCEPTED


def test_a_clear_loss_is_rejected_and_a_small_one_not_shown() -> None:
    full = answers(900, 100)
    assert retained(answers(800, 200), full).verdict(0.99) is Verdict.REJECTED
    assert retained(answers(892, 108), full).verdict(0.99) is Verdict.INCONCLUSIVE
    assert retained(answers(3, 0), answers(3, 0)).verdict(0.99) is Verdict.INCONCLUSIVE
    assert retained([0.0], [1.0]).verdict(0.99) is Verdict.INCONCLUSIVE, "one loss proves little"


def test_gains_and_losses_that_cancel_are_uncertain() -> None:
    same = retained(answers(450, 50), answers(450, 50))
    swapped = retained([0.0] * 40 + [1.0] * 460, [1.0] * 40 + [0.0] * 40 + [1.0] * 420)
    assert same.value == swapped.value == 1
    assert swapped.low < 0.98 < same.low


def test_the_bound_holds_as_often_as_it_says() -> None:
    """A format that keeps exactly 0.99 may be accepted in about one of twenty samples at most."""
    generator = np.random.default_rng(3)
    accepted = 0
    for _ in range(150):
        full = generator.random(2000) < 0.9
        mine = full & (generator.random(2000) < 0.99)
        accepted += retained(mine, full).verdict(0.99) is Verdict.ACCEPTED
    assert accepted <= 15


def test_nothing_right_says_nothing() -> None:
    found = retained([0.0] * 50, [0.0] * 50)
    assert math.isnan(found.value) and found.verdict(0.99) is Verdict.INCONCLUSIVE


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1))
def test_bounds_lie_around_and_repeat(pairs: list[tuple[float, float]]) -> None:
    mine, full = (list(column) for column in zip(*pairs, strict=True))
    found = retained(mine, full)
    assert found.low <= found.high
    if sum(full):
        assert found == retained(mine, full)
        assert isinstance(found, Retained)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(left: int, right: int) -> None:
    expected = stats.binomtest(left, left + right, 0.5).pvalue if left + right else 1.0
    assert mcnemar(left, right) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_thousands_of_pairs() -> None:
    assert mcnemar(5_200, 4_800) == pytest.approx(stats.binomtest(4_800, 10_000).pvalue, rel=1e-8)
    assert 0 < mcnemar(0, 1_000) < 1e-300 or mcnemar(0, 1_000) == pytest.approx(2 * 0.5**1000)


def test_interval_of_pairs_covers() -> None:
    """Of many samples with a known difference, about 95 % of the intervals contain it."""
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
def test_minimum_detectable_effect_has_the_power_it_claims(pairs: int, discordant: float) -> None:
    found = minimum_detectable_effect(pairs, discordant)
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
