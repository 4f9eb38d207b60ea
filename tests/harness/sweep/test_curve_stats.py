"""The curve's statistics: against exact distributions, and a gate that few instances cannot fool."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.statistics import Retained, Verdict, difference, retained


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
    """Few different values are drawn by their counts; jitter that means nothing forces the other way."""
    mine, full = answers(170, 30), answers(190, 10)
    jitter = np.linspace(0, 1e-9, 200)
    counted, drawn = difference(mine, full), difference(np.array(mine) + jitter, full)
    assert (counted.low, counted.high) == pytest.approx((drawn.low, drawn.high), abs=0.006)


@pytest.mark.parametrize("count", [1, 2, 5, 20, 50, 200])
def test_agreement_on_few_instances_is_not_shown(count: int) -> None:
    found = retained(answers(count, 0), answers(count, 0))
    assert found.value == 1
    assert found.verdict(0.99) is Verdict.NOT_SHOWN


def test_agreement_follows_the_rule_of_three() -> None:
    found = retained(answers(1000, 0), answers(1000, 0))
    assert found.low == pytest.approx(1 - 3 / 1000, abs=0.0011)
    assert found.verdict(0.99) is Verdict.ACCEPTED


def test_a_clear_loss_is_rejected_and_a_small_one_not_shown() -> None:
    full = answers(900, 100)
    assert retained(answers(800, 200), full).verdict(0.99) is Verdict.REJECTED
    assert retained(answers(892, 108), full).verdict(0.99) is Verdict.NOT_SHOWN
    assert retained(answers(3, 0), answers(3, 0)).verdict(0.99) is Verdict.NOT_SHOWN
    assert retained([0.0], [1.0]).verdict(0.99) is Verdict.NOT_SHOWN, "one loss proves little"


def test_gains_and_losses_that_cancel_are_uncertain() -> None:
    same = retained(answers(450, 50), answers(450, 50))
    swapped = retained([0.0] * 40 + [1.0] * 460, [1.0] * 40 + [0.0] * 40 + [1.0] * 420)
    assert same.value == swapped.value == 1
    assert swapped.low < 0.98 < same.low


def test_the_bound_holds_as_often_as_it_says() -> None:
    """A format that keeps exactly 0.99 may be accepted in about one of twenty samples, not more."""
    generator = np.random.default_rng(3)
    accepted = 0
    for _ in range(150):
        full = generator.random(2000) < 0.9
        mine = full & (generator.random(2000) < 0.99)
        accepted += retained(mine, full).verdict(0.99) is Verdict.ACCEPTED
    assert accepted <= 15


def test_nothing_right_says_nothing() -> None:
    found = retained([0.0] * 50, [0.0] * 50)
    assert math.isnan(found.value) and found.verdict(0.99) is Verdict.NOT_SHOWN


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1))
def test_bounds_lie_around_and_repeat(pairs: list[tuple[float, float]]) -> None:
    mine, full = (list(column) for column in zip(*pairs, strict=True))
    found = retained(mine, full)
    assert found.low <= found.high
    if sum(full):
        assert found == retained(mine, full)
        assert isinstance(found, Retained)
