"""How many times faster one system is than another: ratios of repeats from the same round, with their spread.

It knows rows of a comparison's table and nothing of how they were measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median and range of a figure that was measured several times."""

    median: float
    least: float
    most: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return Spread(statistics.median(values), min(values), max(values), len(values))

    def text(self, digits: int = 2, alone: str = "") -> str:
        """``0.91 (0.88 to 0.93)``; a single value has no range, ``alone`` follows it instead."""
        middle = f"{self.median:,.{digits}f}"
        if self.count == 1:
            return middle + alone
        return f"{middle} ({self.least:,.{digits}f} to {self.most:,.{digits}f})"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range as text; ``-`` where there are no values."""
    return Spread.of(values).text(digits) if values else "-"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Spread | None:
    """Ours divided by theirs, round by round; None if they have no round in common.

    Rounds are paired because the machine's own state drifts: what slows one system in a round slows all.
    """
    values = [ours[key] / theirs[key] for key in sorted(set(ours) & set(theirs)) if theirs[key] > 0]
    return Spread.of(values) if values else None


@dataclass(frozen=True)
class Ratio:
    """One measure of ours divided by another system's, under one memory limit at equal bits."""

    setting: str
    ours: str
    """Configuration of ours."""

    system: str
    configuration: str
    bits: int
    value: Spread
    """Over the rounds that both completed."""


def ratios(
    rows: Sequence[Mapping[str, Any]], own: str, measure: str = "generated_tokens_per_s"
) -> list[Ratio]:
    """Every configuration of ours against every other system's of equal bits, setting by setting."""
    rates: dict[tuple[str, str, str, int], dict[int, float]] = {}
    for row in rows:
        if row["kind"] == "measured" and row["status"] == "ok" and row["repeat"] > 0 and row.get(measure):
            series = (row["setting"], row["system"], row["configuration"], row["bits"])
            rates.setdefault(series, {})[row["repeat"]] = row[measure]
    found = []
    for (setting, system, mine, bits), values in rates.items():
        if system != own:
            continue
        for (other_setting, other, theirs, other_bits), against in rates.items():
            if other == own or other_setting != setting or other_bits != bits:
                continue
            value = paired(values, against)
            if value is not None:
                found.append(Ratio(setting, mine, other, theirs, bits, value))
    return found
