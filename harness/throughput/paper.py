"""The FlexGen paper's published figures beside simulations on a machine's profile.

The published figures are data (``paper_results.csv``), each with its source; what is simulated is said so.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.spec.policy import Placement, Policy
from harness.text_table import markdown_table

if TYPE_CHECKING:
    from engine.planner import FlexGenRun
    from engine.spec.profile import HardwareProfile

RESULTS = Path(__file__).resolve().parent / "paper_results.csv"
SYSTEMS = {"flexgen": "FlexGen", "flexgen-compressed": "FlexGen, 4 bits"}
_CELL_SHAPES = (("256", "32"), ("512", "32"), ("1024", "32"))
_FEWEST, _MOST = 64, 512
"""Requests that the planner plans for: as many as FlexGen's block holds, within these."""

_POLICY = re.compile(r"(\d+)x(\d+) (\d+)/(\d+) (\d+)/(\d+) (\d+)/(\d+)(.*)")
_ALL = {"opt-30b": "48x3 20/80 0/100 0/100 cpu_attention", "opt-175b": "32x8 0/50 0/0 0/100 cpu_attention"}
_ABLATION = {
    "all": _ALL,
    "no_policy_search": {
        "opt-30b": "48x3 0/100 0/100 0/100 cpu_attention", "opt-175b": "32x1 0/50 0/0 0/100 cpu_attention",
    },
    "no_overlap": {model: f"{policy} overlap=off" for model, policy in _ALL.items()},
    "no_cpu_compute": {model: policy.replace(" cpu_attention", "") for model, policy in _ALL.items()},
    "no_disk": {"opt-30b": _ALL["opt-30b"]},
    "deepspeed_policy": {"opt-30b": "8x1 0/100 100/0 100/0", "opt-175b": "2x1 0/0 100/0 100/0"},
}  # fmt: skip
"""The settings behind the paper's ablation: block, then percents on device and host of weights, KV cache
and hidden states."""


@dataclass(frozen=True)
class PaperRow:
    """One published figure."""

    table: str
    system: str
    model: str
    prompt: str
    generated: str
    metric: str
    published: float | None
    unit: str
    setting: str
    source: str
    note: str
    simulated: float | None = None
    """Of FlexGen's own setting on its own runtime; None where it is not simulated."""

    planned: float | None = None
    """Of the planner's policy on this engine, simulated."""

    policy: str = ""
    """The planner's."""

    @property
    def ratio(self) -> float | None:
        """Simulated over published."""
        return self.simulated / self.published if self.simulated and self.published else None


def read_published() -> list[PaperRow]:
    """All published figures, in the order of the file."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return [
            PaperRow(
                row["table"], row["system"], row["model"], row["prompt_len"], row["gen_len"], row["metric"],
                _number(row["value"]), row["unit"], row["policy"], row["source"], row["note"],
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def setting(text: str, prompt: int, generated: int) -> FlexGenRun | None:
    """A published setting such as ``48x3 20/80 0/100 0/100 cpu_attention``; None if it is none."""
    from engine.planner import FlexGenRun

    match = _POLICY.fullmatch(text)
    if match is None:
        return None
    batch, batches, *percents = map(int, match.groups()[:8])
    weights, kv, hidden = (
        Placement(d / 100, h / 100, (100 - d - h) / 100)
        for d, h in zip(percents[::2], percents[1::2], strict=True)
    )
    policy = Policy(
        weights=weights, kv=kv, activations=hidden, device_batch=batch, num_device_batches=batches
    )
    words = match[9].split()
    return FlexGenRun(
        policy, prompt, generated, "cpu_attention" in words, "W4" in words, "KV4" in words,
        "overlap=off" not in words,
    )  # fmt: skip


def simulate_rows(
    rows: Sequence[PaperRow],
    profile: HardwareProfile,
    plan: bool,
    on_row: Callable[[int, str], None] = lambda done, what: None,
) -> list[PaperRow]:
    """All rows, with simulations where FlexGen's setting is published and is of one T4.

    Args:
        plan: whether the planner finds policies of its own for the 18 cells.
        on_row: told how many rows are done, and which comes.
    """
    from engine.planner import Compression, paper_cell

    found = []
    for index, row in enumerate(rows):
        run = _run_of(row)
        if run is None:
            found.append(row)
            continue
        on_row(index, f"{row.table} {row.system} {row.model} {row.prompt}/{row.generated}")
        accuracy = Compression.FOUR_BITS if row.system == "flexgen-compressed" else Compression.EXACT
        block = run.policy.block_size
        requests = min(max(block, _FEWEST), _MOST) if plan and is_cell(row) else 0
        cell = paper_cell(row.model.replace("-iml", ""), run, profile, requests, accuracy)
        planned, simulated = cell.planned, cell.flexgen.throughput
        if row.metric == "wall_time":  # minutes of all blocks
            simulated = run.generated * _sequences(row) / cell.flexgen.throughput / 60
        found.append(
            replace(
                row,
                simulated=simulated,
                planned=planned.estimate.throughput if planned else None,
                policy=planned.policy.name if planned else "",
            )
        )
    return found


def _sequences(row: PaperRow) -> int:
    """Sequences of a HELM run entry, padded to whole blocks; 0 where the note does not say."""
    match = re.search(r"(\d+) padded sequences", row.note)
    return int(match[1]) if match else 0


def is_cell(row: PaperRow) -> bool:
    """Whether a row is one of the 18 of the paper's throughput tables."""
    shape = (row.prompt, row.generated) in _CELL_SHAPES
    return row.table == "throughput" and row.system in SYSTEMS and shape and bool(row.published)


def error_of(rows: Iterable[PaperRow]) -> float:
    """Geometric mean of how far the simulations are off, as a factor less one; not a number for no rows."""
    logs = [abs(math.log(row.ratio)) for row in rows if row.ratio]
    return math.exp(sum(logs) / len(logs)) - 1 if logs else math.nan


def to_markdown(rows: Sequence[PaperRow], profile: HardwareProfile) -> str:
    """All tables."""
    cells = [row for row in rows if is_cell(row)]
    lines = [
        "# The FlexGen paper beside simulations",
        "",
        f"Machine: {profile.name} ({profile.kind.value}; {profile.source}).",
        "*Published* figures are the authors'. *FlexGen simulated* is their setting on their runtime, walked "
        "on the profile; *planner* is what `run_helm.py plan` finds for prompts of the same length (as many "
        f"as FlexGen's block holds, {_FEWEST} to {_MOST}) and at most the same compression, simulated on "
        "this engine's schedule. Nothing is fitted to these figures.",
        "",
        f"Geometric-mean error of the {len(cells)} cells: {error_of(cells):.3f}.",
    ]
    for table in dict.fromkeys(row.table for row in rows):
        part = [row for row in rows if row.table == table]
        lines += ["", f"## {table.replace('_', ' ')}", "", *_table(part)]
    return "\n".join(lines) + "\n"


def to_json(rows: Sequence[PaperRow], profile: HardwareProfile) -> dict[str, Any]:
    """The same for programs."""
    cells = [row for row in rows if is_cell(row)]
    return {
        "kind": "simulated",
        "profile": {"name": profile.name, "kind": profile.kind.value, "source": profile.source},
        "geometric_mean_error": error_of(cells),
        "cells": len(cells),
        "planner_at_least_as_fast": sum(
            row.planned >= row.simulated for row in cells if row.planned and row.simulated
        ),
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
    }


def _run_of(row: PaperRow) -> FlexGenRun | None:
    """FlexGen's setting behind a row, where it is published and of one machine with one T4."""
    text = row.setting if row.table == "throughput" and row.system in SYSTEMS else ""
    if row.table == "helm" and _sequences(row):
        return setting(row.setting, int(row.prompt), int(row.generated))
    if row.table == "ablation":
        text = _ABLATION.get(row.system, {}).get(row.model, "")
    if row.metric != "generation_throughput" or not text:
        return None
    return setting(text, int(row.prompt), int(row.generated))


def _table(rows: Sequence[PaperRow]) -> list[str]:
    head = ["system", "model", "prompt/generated", "published"]
    simulated, planned = (any(getattr(row, name) for row in rows) for name in ("simulated", "planned"))
    head += ["FlexGen simulated", "simulated / published"] if simulated else []
    head += ["planner", "planner / FlexGen simulated", "planner's policy"] if planned else []
    lines = [head]
    for row in rows:
        length = f"{row.prompt}/{row.generated}" if row.prompt else ""
        cells = [row.system, row.model, length, f"{_show(row.published)} {row.unit}".strip()]
        cells += [_show(row.simulated), _show(row.ratio)] if simulated else []
        if planned:
            gain = row.planned / row.simulated if row.planned and row.simulated else None
            cells += [_show(row.planned), _show(gain), f"`{row.policy}`" if row.policy else ""]
        lines.append(cells)
    return markdown_table(lines, left=len(head), padded=False)


def _show(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None
