"""Figures of the synthetic load as they are printed, and as they are appended to a file of JSON lines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.units import format_bytes, format_rate, format_seconds
from harness.files import JsonLines
from harness.text_table import markdown_table
from harness.throughput.load import Load, MeasuredLoad

_NAMES = {"prefill": "prefill", "decode": "decode", "total": "total (generation)"}


def to_text(measured: MeasuredLoad, weights: str, profile: str | None) -> str:
    """Two tables: throughput and seconds beside the prediction, peaks beside the plan."""
    load, times = measured.load, measured.times
    rates, foreseen = times.rates(load), measured.predicted.rates(load) if measured.predicted else {}
    rows: list[Sequence[str]] = [("", times.kind, "predicted", "off by")]
    for name, shown in _NAMES.items():
        rate, expected = rates[name], foreseen.get(name)
        rows.append((shown, _rate(rate), _rate(expected), _off(rate, expected)))
    for name in ("prefill", "decode"):
        seconds = [getattr(one, f"{name}_seconds", None) for one in (times, measured.predicted)]
        rows.append((f"{name} time", *("-" if s is None else format_seconds(s) for s in seconds), ""))
    held = [("tier", "peak, measured", "peak, planned")]
    for tier, sizes in measured.peaks.items():
        peak, planned = sizes["peak"], sizes["planned"]
        held.append((tier, "-" if peak is None else format_bytes(peak), format_bytes(planned or 0)))
    notes = [f"{weights} weights; throughput in tokens per second as in the FlexGen paper."]
    if profile is None:
        notes.append("No prediction: there is no profile of this machine yet, see run_helm.py profile.")
    else:
        notes.append(f"Predicted from the profile {profile}.")
    if times.kind == "projected":
        notes.append(
            "Projected from fewer passes or layers: the peak of a shorter run is not that of the whole."
        )
    return "\n".join([*markdown_table(rows, left=1), "", *markdown_table(held, left=1), "", " ".join(notes)])


def cells_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every cell of a table, with the kind of each figure and the machine that it speaks of."""
    keys = ("model", "formats", "policy", "block", "kind", "machine")
    lines: list[Sequence[str]] = [(*keys, *_NAMES, "predicted total", "note")]
    for row in rows:
        rates, foreseen = row.get("throughput") or {}, (row.get("predicted") or {}).get("throughput", {})
        figures = (_figure(rate) for rate in (*map(rates.get, _NAMES), foreseen.get("total")))
        lines.append((*(row[key] for key in keys), *figures, row.get("note", "")))
    return "\n".join(markdown_table(lines, left=6))


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line of JSON with the time; raises StorageError if it cannot be written."""
    JsonLines(path).add({**row, "at": time.strftime("%Y-%m-%dT%H:%M:%S")})


def load_text(load: Load) -> str:
    """A load in words."""
    return f"{load.requests} x {load.prompt_len} prompt tokens, {load.gen_len} generated each"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else format_rate(rate, "token")


def _figure(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.{0 if rate >= 100 else 2}f}" if rate >= 0.01 else f"{rate:.4f}"


def _off(measured: float | None, predicted: float | None) -> str:
    return f"{predicted / measured - 1:+.0%}" if measured and predicted else "-"
