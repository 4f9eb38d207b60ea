"""How many times faster: ratios of repeats that were run in the same round, with their spread.

It knows tidy rows and nothing of how they came about.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """Ours divided by theirs, of one measure."""

    setting: str
    ours: str
    """Configuration of ours."""

    system: str
    configuration: str
    bits: int
    median: float
    low: float
    high: float
    """The smallest and the largest of the rounds."""

    rounds: int

    def __str__(self) -> str:
        if self.rounds == 1:
            return f"{self.median:.2f} (one round)"
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, float, int] | None:
    """Median, smallest and largest of the rounds' ratios, and how many rounds; None without a common round.

    Rounds are paired because the machine's own state drifts: what slows one round slows both.
    """
    values = [ours[key] / theirs[key] for key in sorted(set(ours) & set(theirs)) if theirs[key] > 0]
    if not values:
        return None
    return statistics.median(values), min(values), max(values), len(values)


def ratios(rows: Sequence[Row], own: str, measure: str = "generated_tokens_per_s") -> list[Ratio]:
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
            one = paired(values, against)
            if one is not None:
                found.append(Ratio(setting, mine, other, theirs, bits, *one))
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range; one value alone stands without a range."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):,.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
