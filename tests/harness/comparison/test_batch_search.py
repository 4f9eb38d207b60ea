"""The search for a batch size, and the order of repeats."""

from __future__ import annotations

from harness.comparison.search import rotated, search


def tried(rates: dict[int, float | None], most: int = 64, first: int = 1) -> tuple[list[int], int | None]:
    """The batch sizes that were measured, in order, and the one that was chosen."""
    order: list[int] = []

    def measure(batch: int) -> float | None:
        order.append(batch)
        return rates[batch]

    return order, search(measure, most, first)


def test_the_largest_that_completes_and_its_neighbours_are_tried() -> None:
    rates = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: None, 12: 11.0, 14: None}
    assert tried(rates) == ([1, 2, 4, 8, 16, 12, 14], 12)


def test_the_fastest_is_chosen_though_larger_ones_complete() -> None:
    rates = {1: 1.0, 2: 3.0, 4: 2.5, 8: 2.4}
    assert tried(rates) == ([1, 2, 4, 8], 2)


def test_it_goes_on_after_one_size_without_gain() -> None:
    rates = {1: 2.0, 2: 1.9, 4: 4.0, 8: 3.8, 16: 3.7}
    assert tried(rates) == ([1, 2, 4, 8, 16], 4)


def test_it_goes_on_where_nothing_is_lost() -> None:
    rates = {1: 2.0, 2: 2.0, 4: 1.98, 8: 2.01}
    assert tried(rates, most=8) == ([1, 2, 4, 8], 8)


def test_the_limit_itself_is_tried() -> None:
    rates = {1: 1.0, 2: 2.0, 4: 4.0, 6: 5.0}
    assert tried(rates, most=6) == ([1, 2, 4, 6], 6)


def test_a_search_may_begin_in_the_middle() -> None:
    rates = {8: 5.0, 16: 7.0, 32: None, 24: 8.0, 28: 7.9}
    assert tried(rates, first=16) == ([16, 32, 8, 24, 28], 24)
    assert tried({4: 3.0, 8: 2.0, 2: 2.5, 16: 1.0}, first=4) == ([4, 8, 16, 2], 4)
    assert tried({4: 3.0, 8: 2.0, 2: 4.0, 16: 1.0, 1: 5.0}, first=4) == ([4, 8, 16, 2, 1], 1)


def test_a_search_that_begins_too_high_comes_down() -> None:
    assert tried({16: None, 8: None, 4: 2.0, 2: 1.0, 6: 3.0, 7: None}, first=16) == ([16, 8, 4, 2, 6, 7], 6)
    assert tried({3: None, 1: None}, first=3) == ([3, 1], None)
    assert tried({6: 1.0, 3: 0.5}, most=6, first=40) == ([6, 3], 6)


def test_nothing_completes() -> None:
    assert tried({1: None}) == ([1], None)
    assert tried({1: 1.0, 2: None}) == ([1, 2], 1)


def test_every_place_is_taken_by_everyone_and_neighbours_change() -> None:
    orders = [rotated("abcd", turn) for turn in range(8)]
    for place in range(4):
        assert {order[place] for order in orders} == set("abcd")
    assert len({(order[i], order[i + 1]) for order in orders for i in range(3)}) == 8
    assert rotated([], 3) == []
    assert rotated("a", 3) == ["a"]
