"""A comparison as data: tidy rows, their files, and the Markdown tables that are printed.

It knows the records of trials, not how they were measured. One row is one repeat of one system's
configuration under one memory limit, or one reason why there is none.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.files.whole import write_whole
from engine.units import format_bytes
from harness.comparison.options import MemoryCap, Model, Trial
from harness.comparison.ratios import Ratio, spread
from harness.suite.table import CHAT_NOTES
from harness.text_table import markdown_table

COLUMNS: Mapping[str, str] = {
    "system": "string", "configuration": "string", "bits": "Int64", "model": "string", "setting": "string",
    "workload": "string", "prompt_len": "Int64", "gen_len": "Int64", "batch": "Int64", "repeat": "Int64",
    "generated_tokens_per_s": "Float64", "total_tokens_per_s": "Float64", "prefill_s": "Float64",
    "decode_s": "Float64", "peak_bytes": "Int64", "anonymous_bytes": "Int64", "device_peak_bytes": "Int64",
    "bytes_read": "Int64", "bytes_written": "Int64", "memory_cap_bytes": "Int64", "cap_enforced": "string",
    "agreement": "Float64", "logit_distance": "Float64", "accuracy": "Float64", "status": "string",
    "reason": "string", "kind": "string", "command": "string", "versions": "string", "settings": "string",
}  # fmt: skip
"""Columns and their types, in order. docs/comparison.md explains each, with its unit."""

Row = dict[str, Any]


def row_of(
    trial: Trial, record: Mapping[str, Any], model: Model, memory_cap: MemoryCap, bits: int, workload: str
) -> Row:
    """One measured row; what a failed trial could not measure is null."""
    row: Row = dict.fromkeys(COLUMNS)
    row |= {key: record[key] for key in COLUMNS if key in record and key not in ("command", "versions")}
    row |= {key: value for key, value in vars(trial).items() if key in COLUMNS}
    return row | {
        "bits": bits,
        "model": model.name,
        "setting": memory_cap.label,
        "workload": workload,
        "memory_cap_bytes": memory_cap.nbytes,
        "cap_enforced": record.get("cap_enforced", "not started"),
        "kind": "measured",
        "reason": portable(str(record.get("reason", ""))),
        "command": portable(shlex.join(record.get("command", ()))),
        "versions": json.dumps(record.get("versions", {}), sort_keys=True),
        "settings": json.dumps(dict(trial.settings), sort_keys=True),
    }


def portable(text: str) -> str:
    """A text without this machine's folders: ``.`` for the working folder, ``~`` for the user's home."""
    return text.replace(str(Path.cwd()), ".").replace(str(Path.home()), "~")


def write(rows: Sequence[Row], folder: Path, name: str = "comparison") -> None:
    """Write the rows as Parquet and CSV; raises StorageError if the folder cannot be written."""
    import pandas as pd

    frame = pd.DataFrame([[row.get(column) for column in COLUMNS] for row in rows], columns=list(COLUMNS))
    frame = frame.astype(dict(COLUMNS))
    write_whole(folder / f"{name}.parquet", frame.to_parquet(index=False))
    write_whole(folder / f"{name}.csv", frame.to_csv(index=False))


def to_markdown(rows: Sequence[Row], ratios: Sequence[Ratio], own: str) -> str:
    """A table of all systems per memory limit, then ours against each at equal bits."""
    text = []
    for setting in dict.fromkeys(row["setting"] for row in rows if row["kind"] == "measured"):
        there = [row for row in rows if row["setting"] == setting and row["kind"] == "measured"]
        first = there[0]
        text += [f"{first['model']}, {setting}, {first['workload']}", "", *_measured(there), ""]
    if ratios:
        text += [f"Generated token/s of {own} divided by that of others at equal bits, by rounds", ""]
        header = ("setting", own, "against", "bits", "ratio")
        lines = []
        for r in ratios:
            against, value = f"{r.system}/{r.configuration}", r.value.text(alone=" (one round)")
            lines.append((r.setting, r.ours, against, str(r.bits), value))
        text += [*markdown_table([header, *lines], left=3), ""]
    published = [row for row in rows if row["kind"] == "published"]
    if published:
        header = ("published, not run here", "model", "setting", "generated token/s", "source")
        lines = [
            (f"{row['system']}/{row['configuration']}", row["model"], row["setting"],
             f"{row['generated_tokens_per_s']:,.2f}" if row["generated_tokens_per_s"] else "-", row["reason"])
            for row in published
        ]  # fmt: skip
        text += [*markdown_table([header, *lines], left=3), ""]
    return "\n".join(text)


def entries_markdown(rows: Sequence[Row], chat: bool) -> str:
    """The table of run entries, with the accuracy of every system; ``chat`` says how they were asked."""
    header = ("accuracy on", "setting", "system", "accuracy", "limit", "outcome")
    lines = [
        (str(row["workload"]), str(row["setting"]), f"{row['system']}/{row['configuration']}",
         "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}",
         str(row["cap_enforced"]), f"{row['status']} {row['reason']}".strip()[:90])
        for row in rows
    ]  # fmt: skip
    return "\n".join(["", *markdown_table([header, *lines], left=3), "", CHAT_NOTES[chat], ""])


def _measured(rows: Sequence[Row]) -> list[str]:
    header = (
        "system", "bits", "batch", "generated token/s", "total token/s", "prefill s", "decode s",
        "peak", "read", "agreement", "logit distance", "accuracy", "limit", "outcome",
    )  # fmt: skip
    lines = [header]
    for system, configuration in dict.fromkeys((row["system"], row["configuration"]) for row in rows):
        own = [row for row in rows if (row["system"], row["configuration"]) == (system, configuration)]
        good = [row for row in own if row["status"] == "ok" and row["generated_tokens_per_s"]]
        failures = [f"{row['status']}: {row['reason']}"[:90] for row in own if row["status"] != "ok"]
        shown = good or own
        lines.append((
            f"{system}/{configuration}", str(shown[0]["bits"]), str(shown[0]["batch"]),
            spread(_values(shown, "generated_tokens_per_s")), spread(_values(shown, "total_tokens_per_s"), 1),
            _first(shown, "prefill_s", 2), _first(shown, "decode_s", 2), _peak(shown, "peak_bytes"),
            _peak(shown, "bytes_read"), _first(shown, "agreement"), _first(shown, "logit_distance", 4),
            _first(shown, "accuracy"), str(shown[0]["cap_enforced"]),
            "; ".join([*(["ok"] if good else []), *dict.fromkeys(failures)]),
        ))  # fmt: skip
    return markdown_table(lines, left=1)


def _values(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows if row[key] is not None]


def _first(rows: Sequence[Row], key: str, digits: int = 3) -> str:
    return next((f"{value:.{digits}f}" for value in _values(rows, key)), "-")


def _peak(rows: Sequence[Row], key: str) -> str:
    return format_bytes(max(_values(rows, key))) if _values(rows, key) else "-"
