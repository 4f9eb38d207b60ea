"""The batch size at which a system is fastest, found in a bounded number of runs; and the order of repeats.

It knows rates by batch size and nothing of how they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

REFINEMENTS = 2
"""How often the gap between the largest size that ran and the smallest that failed is halved."""

PATIENCE = 2
"""How many doublings in a row without gain end the search."""

LOSS = 0.97
"""A rate below this share of the best one so far is no gain; timings are noisy."""


Rates = dict[int, float | None]
"""Generated token/s by batch size; None where the run did not complete."""


def search(measure: Callable[[int], float | None], most: int, first: int = 1) -> int | None:
    """The fastest batch size that is found; None if none completes.

    The size is doubled until a run fails, ``most`` is reached or larger sizes do not gain; then the gap is
    halved. If ``first`` is more than 1, sizes are also halved for as long as the smallest is the fastest, or
    none has completed.

    Args:
        measure: generated token/s of a batch size, None if it did not complete.
        most: largest batch size tried.
        first: the size to begin with.
    """
    rates: Rates = {}
    failed = _upwards(rates, measure, most, min(first, most))
    while min(rates) > 1 and _best(rates) in (None, min(rates)):
        smaller = min(rates) // 2
        rates[smaller] = measure(smaller)
        if _best(rates) is None:
            failed = smaller
    for _ in range(REFINEMENTS):
        largest = max((batch for batch, rate in rates.items() if rate), default=None)
        if failed is None or largest is None or failed - largest < 2:
            break
        middle = (failed + largest) // 2
        rate = rates[middle] = measure(middle)
        if rate is None:
            failed = middle
    return _best(rates)


def _best(rates: Rates) -> int | None:
    return max((batch for batch in rates if rates[batch]), key=lambda batch: rates[batch] or 0, default=None)


def _upwards(rates: Rates, measure: Callable[[int], float | None], most: int, batch: int) -> int | None:
    """Double the size, beginning with ``batch``; returns the size that failed, if one did."""
    best, idle = 0.0, 0
    while True:
        rate = rates[batch] = measure(batch)
        if rate is None:
            return batch
        idle = 0 if rate >= best * LOSS else idle + 1
        best = max(best, rate)
        if idle >= PATIENCE or batch == most:
            return None
        batch = min(2 * batch, most)


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The items forwards (turn 0), backwards (turn 1), then forwards and backwards from the next item on.

    So no item is always the first, and none always follows the same other one.
    """
    if not items:
        return []
    start = turn // 2 % len(items)
    order = [*items[start:], *items[:start]]
    return order[::-1] if turn % 2 else order
