"""The section that sets ours beside other offloaders: ratios as pictures, every system in a table.

It knows what `harness.report.analysis.systems` read; it does not know how the systems were run.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from harness.report.analysis.systems import ENTRY_PREFIX, Systems, number_of, text_of
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
from harness.report.plots import systems as plots_systems


def section(found: Sequence[Systems]) -> tuple[Section, ...]:
    """Pictures and tables of every comparison."""
    if not found:
        return ()
    text = (
        "The same requests, weights and memory cap through every system, each in a process of its own on one "
        "machine. Ratios are ours over theirs of generated token/s at equal bits: the median over repeats, "
        "with the smallest and the largest. What failed or could not run is in the table with its reason; "
        "published figures are labelled and enter no ratio."
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
        peak, cap = number_of(best.get("peak_bytes")), number_of(best.get("memory_cap_bytes"))
        rows.append((
            s.setting, Name(s.name), s.outcome if len(s.outcome) < 160 else f"{s.outcome[:160]}…",
            s.kind, s.bits or MISSING, _whole(best.get("batch")),
            per_second(median(rates)) if rates else MISSING, spread,
            per_second(number_of(best.get("total_tokens_per_s"))),
            size(peak) if peak else MISSING, size(cap) if cap else "none",
            fraction(number_of(best.get("agreement"))), fraction(number_of(best.get("logit_distance"))),
            fraction(number_of(best.get("accuracy"))), text_of(best.get("cap_enforced")) or MISSING,
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
            Name(text_of(row["workload"]).removeprefix(ENTRY_PREFIX).strip()), text_of(row["setting"]),
            Name(f"{row['system']} {text_of(row['configuration'])}".strip()),
            fraction(number_of(row.get("accuracy"))),
            "ok" if row["status"] == "ok" else f"{row['status']}: {text_of(row.get('reason'))}"[:160],
        )
        for row in one.entries
    )  # fmt: skip
    columns = ("run entry", "setting", "system", "accuracy", "outcome")
    return Table(f"Accuracy on run entries, comparison {one.name}", columns, rows, names=3)


def _whole(value: Any) -> Cell:
    number = number_of(value)
    return MISSING if number is None else count(int(number))
