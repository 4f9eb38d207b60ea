"""Ours beside other offloaders: reads a comparison's tidy table and makes ratios with their spread.

It knows the table's columns (``results/comparisons/<name>/comparison.parquet`` or ``.csv``); it does not know
how the systems were run.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from engine.errors import UsageError, first_line
from harness.comparison.ratios import Spread, paired
from harness.comparison.rows import COLUMNS

OWN = "ours"
"""How a comparison calls this engine."""

ENTRY_PREFIX = "run entry"
"""How the workload of a row begins that holds an accuracy and no speed."""

_NEEDED = ("system", "configuration", "setting", "status", "generated_tokens_per_s")


@dataclass(frozen=True)
class System:
    """All repeats of one system as configured, under one setting."""

    setting: str
    system: str
    configuration: str
    bits: str
    kind: str
    outcome: str
    """"ok", or why there are no figures."""

    rates: Mapping[int, float]
    """Generated token/s by repeat."""

    best: Mapping[str, Any]
    """The row whose other figures are shown."""

    @property
    def own(self) -> bool:
        """Whether it is this engine."""
        return self.system == OWN

    @property
    def name(self) -> str:
        """As pictures call it."""
        return f"{self.system} {self.configuration}".strip()


@dataclass(frozen=True)
class Against:
    """Ours over theirs, of generated token/s."""

    setting: str
    mine: System
    theirs: System
    ratio: Spread
    """Over the repeats, paired by their number."""


@dataclass(frozen=True)
class Systems:
    """One comparison."""

    name: str
    systems: tuple[System, ...]
    entries: tuple[Mapping[str, Any], ...] = ()
    """Rows of run entries: what every system scores on them."""

    @property
    def ratios(self) -> list[Against]:
        """Our fastest configuration of equal bits against every other system, setting by setting."""
        found = []
        for theirs in self.systems:
            if theirs.own or not theirs.rates or theirs.kind != "measured":
                continue
            mine = [
                s for s in self.systems
                if s.own and s.rates and s.setting == theirs.setting and s.bits == theirs.bits
            ]  # fmt: skip
            if mine:
                best = max(mine, key=lambda system: median(system.rates.values()))
                found.append(_against(best, theirs))
        return found


def _against(mine: System, theirs: System) -> Against:
    """By rounds; rates without a common round are all divided by each other and count as one."""
    ratio = paired(mine.rates, theirs.rates)
    if ratio is None:
        values = [a / b for a in mine.rates.values() for b in theirs.rates.values()]
        ratio = replace(Spread.of(values), count=1)
    return Against(mine.setting, mine, theirs, ratio)


def read_systems(folder: Path) -> Systems:
    """Read a comparison's folder.

    Raises:
        UsageError: if there is no table, or it lacks columns.
    """
    rows = _rows(folder)
    if not rows or any(key not in rows[0] for key in _NEEDED):
        lacking = [key for key in _NEEDED if not rows or key not in rows[0]]
        raise UsageError(f"the table of {folder} lacks {', '.join(lacking)}: run run_helm.py compare again")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    entries = [row for row in rows if text_of(row.get("workload")).startswith(ENTRY_PREFIX)]
    for row in rows:
        if row in entries:
            continue
        key = tuple(text_of(row.get(k)) for k in ("system", "configuration", "bits"))
        groups.setdefault((_setting(row), *key), []).append(row)
    return Systems(folder.name, tuple(_system(key, group) for key, group in groups.items()), tuple(entries))


def _rows(folder: Path) -> list[dict[str, Any]]:
    table, text = folder / "comparison.parquet", folder / "comparison.csv"
    try:
        if table.is_file():
            import pyarrow.parquet

            return list(pyarrow.parquet.read_table(table).to_pylist())
        if text.is_file():
            with text.open(encoding="utf-8", newline="") as file:
                return [_typed(row) for row in csv.DictReader(file)]
    except Exception as error:  # whatever a damaged file makes of a reader
        raise UsageError(
            f"the table of {folder} is damaged ({first_line(error)}): run run_helm.py compare again"
        ) from error
    raise UsageError(f"{folder} holds no comparison.parquet or .csv: first run_helm.py compare")


def _setting(row: Mapping[str, Any]) -> str:
    """Under what it ran. Rows of one comparison are of one model, but published ones, which name theirs."""
    model = text_of(row.get("model")) if row.get("kind") == "published" else ""
    return ", ".join(filter(None, (model, text_of(row.get("setting")))))


def _typed(row: Mapping[str, str]) -> dict[str, Any]:
    texts = {key for key, kind in COLUMNS.items() if kind == "string"}
    return {key: value if key in texts else float(value) if value else None for key, value in row.items()}


def _system(key: tuple[str, ...], rows: Sequence[Mapping[str, Any]]) -> System:
    good = [
        row
        for row in rows
        if row["status"] in ("ok", "published") and number_of(row.get("generated_tokens_per_s"))
    ]
    repeats = [row for row in good if (number_of(row.get("repeat")) or 0) > 0] or good
    rates = {
        int(row.get("repeat") or i): float(row["generated_tokens_per_s"]) for i, row in enumerate(repeats)
    }
    failed = next((row for row in rows if row["status"] != "ok"), rows[0])
    outcome = "ok" if good else f"{text_of(failed['status'])}: {text_of(failed.get('reason'))}".rstrip(": ")
    kind = text_of((good or rows)[0].get("kind")) or "not recorded"
    if good and kind != "measured":
        outcome = text_of(good[0].get("reason")) or outcome
    return System(key[0], key[1], key[2], key[3], kind, outcome, rates, (repeats or rows)[0])


def number_of(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def text_of(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)
