"""Ratios of rounds, their spread, and what may be compared with what."""

from __future__ import annotations

from typing import Any

import pytest

from harness.comparison.ratios import Spread, paired, ratios, spread
from harness.comparison.rows import to_markdown


def row(system: str, repeat: int, rate: float | None, **more: Any) -> dict[str, Any]:
    """A measured row; ``more`` replaces what makes rows comparable."""
    return {
        "kind": "measured", "status": "ok", "setting": "all", "system": system, "configuration": "c",
        "bits": 16, "repeat": repeat, "generated_tokens_per_s": rate, **more,
    }  # fmt: skip


def test_rounds_are_paired_before_they_are_divided() -> None:
    # The machine was half as fast in the second round: each system's median would hide that they are even.
    assert paired({1: 20.0, 2: 10.0, 3: 30.0}, {1: 10.0, 2: 5.0, 3: 15.0}) == Spread(2.0, 2.0, 2.0, 3)
    assert paired({1: 4.0, 2: 9.0, 3: 10.0}, {1: 2.0, 2: 3.0, 3: 2.0}) == Spread(3.0, 2.0, 5.0, 3)
    assert paired({1: 4.0, 2: 6.0}, {2: 2.0, 3: 1.0}) == Spread(3.0, 3.0, 3.0, 1)
    assert paired({1: 4.0}, {2: 2.0}) is None
    assert paired({1: 4.0}, {1: 0.0}) is None


def test_only_equals_are_compared() -> None:
    rows = [
        row("ours", 1, 8.0), row("ours", 2, 9.0), row("ours", 1, 99.0, bits=4, configuration="4bit"),
        row("a", 1, 4.0), row("a", 2, 3.0),
        row("b", 1, 4.0, bits=8), row("b", 1, 4.0, setting="capped"),
        row("c", 1, None, status="out_of_memory"), row("d", 0, 1.0), row("e", 1, 1.0, kind="published"),
    ]  # fmt: skip
    (found,) = ratios(rows, "ours")
    assert (found.system, found.ours, found.bits) == ("a", "c", 16)
    assert found.value == Spread(2.5, 2.0, 3.0, 2)
    assert found.value.text() == "2.50 (2.00 to 3.00)"
    (one_round,) = ratios([row("ours", 1, 3.0), row("a", 1, 2.0)], "ours")
    assert "1.50 (one round)" in to_markdown([], [one_round], "ours")


@pytest.mark.parametrize(
    ("values", "shown"), [([], "-"), ([2.0], "2.00"), ([3.0, 1.0, 2.0], "2.00 (1.00 to 3.00)")]
)
def test_spread(values: list[float], shown: str) -> None:
    assert spread(values) == shown
