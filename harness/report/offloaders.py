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

from engine.errors import UsageError
from harness.comparison.ratios import Spread, paired
from harness.report.content import (
    MISSING,
    Cell,
    Figure,
    Name,
    Number,
    Section,
    Table,
    count,
    fraction,
    per_second,
    size,
)

OWN = "ours"
"""How a comparison calls this engine."""

_ENTRY = "run entry"
"""How the workload of a row begins that holds an accuracy and no speed."""

_NEEDED = ("system", "configuration", "setting", "status", "generated_tokens_per_s")
_NUMBERS = (
    "generated_tokens_per_s", "total_tokens_per_s", "prefill_s", "decode_s", "peak_bytes", "memory_cap_bytes",
    "agreement", "logit_distance", "accuracy", "bits", "batch", "repeat", "prompt_len", "gen_len",
)  # fmt: skip


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
    entries = [row for row in rows if _text(row.get("workload")).startswith(_ENTRY)]
    for row in rows:
        if row in entries:
            continue
        key = tuple(_text(row.get(k)) for k in ("system", "configuration", "bits"))
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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"the table of {folder} is damaged ({reason}): run run_helm.py compare again"
        ) from error
    raise UsageError(f"{folder} holds no comparison.parquet or .csv: first run_helm.py compare")


def _setting(row: Mapping[str, Any]) -> str:
    """Under what it ran. Rows of one comparison are of one model, but published ones, which name theirs."""
    model = _text(row.get("model")) if row.get("kind") == "published" else ""
    return ", ".join(filter(None, (model, _text(row.get("setting")))))


def _typed(row: Mapping[str, str]) -> dict[str, Any]:
    return {
        key: (float(value) if value else None) if key in _NUMBERS else value for key, value in row.items()
    }


def _system(key: tuple[str, ...], rows: Sequence[Mapping[str, Any]]) -> System:
    good = [
        row
        for row in rows
        if row["status"] in ("ok", "published") and _number(row.get("generated_tokens_per_s"))
    ]
    repeats = [row for row in good if (_number(row.get("repeat")) or 0) > 0] or good
    rates = {
        int(row.get("repeat") or i): float(row["generated_tokens_per_s"]) for i, row in enumerate(repeats)
    }
    failed = next((row for row in rows if row["status"] != "ok"), rows[0])
    outcome = "ok" if good else f"{_text(failed['status'])}: {_text(failed.get('reason'))}".rstrip(": ")
    kind = _text((good or rows)[0].get("kind")) or "not recorded"
    if good and kind != "measured":
        outcome = _text(good[0].get("reason")) or outcome
    return System(key[0], key[1], key[2], key[3], kind, outcome, rates, (repeats or rows)[0])


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)


def section(found: Sequence[Systems]) -> tuple[Section, ...]:
    """Pictures and tables of every comparison."""
    if not found:
        return ()
    from harness.report.plots import systems as plots_systems

    text = (
        "The same requests, weights and memory cap through every system, each in a process of its own on one "
        "machine. Ratios are ours over theirs of generated token/s at equal bits: the median over "
        "repeats, from "
        "the smallest to the largest. What failed or could not run stands in the table with its reason; "
        "published figures are labelled so and enter no ratio."
    )
    figures, tables = [], []
    for index, one in enumerate(found):
        suffix = f"-{index}" if index else ""
        if one.ratios:
            figures.append(
                Figure(
                    f"ratios{suffix}.svg",
                    f"How many times faster ours is than {len(one.ratios)} systems",
                    f"Generated token/s, ours over theirs: comparison {one.name} (measured).",
                    _ratio_table(one),
                    lambda one=one, suffix=suffix: plots_systems.ratios(one, suffix),  # type: ignore[misc]
                )
            )
        tables.append(_system_table(one))
        if one.entries:
            tables.append(_entry_table(one))
    return (Section("Ours against other offloaders", (text,), tuple(figures), tuple(tables)),)


def _ratio_table(one: Systems) -> Table:
    rows = tuple(
        (
            a.setting, Name(a.theirs.name), Name(a.mine.name), a.mine.bits,
            Number(f"{a.ratio.median:.2f}×", a.ratio.median),
            Number(f"{a.ratio.least:.2f} to {a.ratio.most:.2f}", a.ratio.least), count(a.ratio.count),
        )
        for a in one.ratios
    )  # fmt: skip
    columns = ("setting", "system", "ours", "bits", "ours / theirs", "spread", "repeats")
    return Table(f"Ratios of generated token/s, comparison {one.name} (measured)", columns, rows, names=3)


def _system_table(one: Systems) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for s in one.systems:
        rates, best = list(s.rates.values()), s.best
        spread = Number(f"{min(rates):,.2f} to {max(rates):,.2f}", min(rates)) if len(rates) > 1 else MISSING
        peak, cap = _number(best.get("peak_bytes")), _number(best.get("memory_cap_bytes"))
        rows.append((
            s.setting, Name(s.name), s.outcome if len(s.outcome) < 160 else f"{s.outcome[:160]}…",
            s.kind, s.bits or MISSING, _whole(best.get("batch")),
            per_second(median(rates)) if rates else MISSING, spread,
            per_second(_number(best.get("total_tokens_per_s"))),
            size(peak) if peak else MISSING, size(cap) if cap else "none",
            fraction(_number(best.get("agreement"))), fraction(_number(best.get("logit_distance"))),
            fraction(_number(best.get("accuracy"))), _text(best.get("cap_enforced")) or MISSING,
        ))  # fmt: skip
    columns = (
        "setting", "system", "outcome", "kind", "bits", "batch", "generated token/s", "spread",
        "total token/s", "peak", "cap", "same tokens", "logit distance", "accuracy",
        "limit",
    )  # fmt: skip
    return Table(f"Systems, comparison {one.name}", columns, tuple(rows), names=4)


def _entry_table(one: Systems) -> Table:
    rows = tuple(
        (
            Name(_text(row["workload"]).removeprefix(_ENTRY).strip()), _text(row["setting"]),
            Name(f"{row['system']} {_text(row['configuration'])}".strip()),
            fraction(_number(row.get("accuracy"))),
            "ok" if row["status"] == "ok" else f"{row['status']}: {_text(row.get('reason'))}"[:160],
        )
        for row in one.entries
    )  # fmt: skip
    columns = ("run entry", "setting", "system", "accuracy", "outcome")
    return Table(f"Accuracy on run entries, comparison {one.name}", columns, rows, names=3)


def _whole(value: Any) -> Cell:
    number = _number(value)
    return MISSING if number is None else count(int(number))
