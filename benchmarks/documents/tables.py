"""Tables of the documents: measured rows and the demo from committed files, batch fields from the code."""

from __future__ import annotations

import csv
import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.units import format_bytes
from harness.openai_batch.fields import CHAT_NEUTRAL, FIELDS, NEUTRAL, WITHOUT_EFFECT, Field

ROOT = Path(__file__).resolve().parent.parent.parent
COMPARISONS = ROOT / "results" / "comparisons"


@dataclass(frozen=True)
class Measured:
    """One configuration of ours beside one of another system's."""

    folder: str
    """Below results/comparisons."""

    model: str
    memory: str
    machine: str
    ours: str
    system: str
    configuration: str
    title: str
    """The other system as the table names it."""


HALF, RAM = "half of the model", "all in RAM"
OPT, LLAMA, LLAMA_4BIT = "OPT-1.3B, 16 bits", "Llama 1.1B, 16 bits", "Llama 1.1B, 4 bits"
MEASURED = (
    Measured("cpu-opt-1.3b-searched", OPT, HALF, "Zen 4", "full", "accelerate", "disk", "Accelerate"),
    Measured("cpu-llama-1.1b-searched", LLAMA, HALF, "Zen 4", "full", "llama-cpp", "f16", "llama.cpp f16"),
    Measured(
        "cpu-llama-1.1b-searched", LLAMA_4BIT, HALF, "Zen 4",
        "4bit-a8", "llama-cpp", "q4_0", "llama.cpp q4_0",
    ),
    Measured(
        "cpu-llama-1.1b-4bit-intel", LLAMA_4BIT, HALF, "Xeon",
        "4bit-a8", "llama-cpp", "q4_0", "llama.cpp q4_0",
    ),
    Measured(
        "cpu-llama-1.1b-ram-searched", LLAMA, RAM, "Xeon", "full", "transformers", "full", "transformers"
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Generated tokens per second of both, medians of the rounds, and ours over theirs by rounds."""

    ours: float
    theirs: float
    ratio: float
    least: float
    most: float


def rates_of(row: Measured) -> Rates:
    """Read a row's figures from its comparison.csv."""
    rounds: dict[tuple[str, str], dict[int, float]] = {}
    with (COMPARISONS / row.folder / "comparison.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            if line["status"] == "ok" and int(line["repeat"]) > 0 and line["generated_tokens_per_s"]:
                series = rounds.setdefault((line["system"], line["configuration"]), {})
                series[int(line["repeat"])] = float(line["generated_tokens_per_s"])
    ours, theirs = rounds["ours", row.ours], rounds[row.system, row.configuration]
    ratios = [ours[number] / theirs[number] for number in sorted({*ours} & {*theirs})]
    return Rates(
        statistics.median(ours.values()),
        statistics.median(theirs.values()),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )


def measured_table() -> str:
    """The README's table of measured rows, as Markdown."""
    lines = [
        "| model | memory | machine | against | Tierbench | theirs | ratio of the rounds |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for row in MEASURED:
        rates = rates_of(row)
        place = f"results/comparisons/{row.folder}/comparison.md"
        lines.append(
            f"| {row.model} | {row.memory} | {row.machine} | {row.title} "
            f"| {rates.ours:.2f} | {rates.theirs:.2f} "
            f"| [**{rates.ratio:.2f}×**]({place}) ({rates.least:.2f} to {rates.most:.2f}) |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class DemoRow:
    """A row of the demo's table."""

    entry: str
    policy: str
    accuracy: float
    low: float
    high: float
    """The 95 % interval."""

    rate: float
    """Prompt and generated tokens per second."""


def demo_rows(document: str) -> list[DemoRow]:
    """The rows of the table in docs/demo.md."""
    rows = []
    for line in document.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 7 and cells[2].isdigit():
            low, high = map(float, cells[4].split(" to "))
            rate = float(cells[6].replace(",", ""))
            rows.append(DemoRow(cells[0], cells[1], float(cells[3]), low, high, rate))
    return rows


def demo_summary(rows: Sequence[Mapping[str, Any]], peaks: Mapping[str, Mapping[str, int]]) -> str:
    """One row per policy: mean accuracy over run entries, all tokens over all seconds, peak memory.

    ``rows`` and ``peaks`` are those of a suite's table.json.
    """
    lines = [
        "| policy | mean accuracy | total token/s | peak device | peak host | peak disk |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        accuracy = statistics.mean(row["accuracy"] for row in mine)
        tokens = sum(row["prompt_tokens"] + row["generated_tokens"] for row in mine)
        tiers = " | ".join(format_bytes(peaks[policy][tier]) for tier in ("device", "host", "disk"))
        rate = tokens / sum(row["seconds"] for row in mine)
        lines.append(f"| `{policy}` | {accuracy:.3f} | {rate:,.0f} | {tiers} |")
    return "\n".join(lines)


def batch_fields() -> str:
    """What a line of a batch file may say: a row per field that is done, and the names of the others."""
    lines = ["| field | of | value | default | meaning |", "|---|---|---|---|---|"]
    for field in FIELDS:
        where = "both" if field.completions and field.chat else "chat" if field.chat else "completions"
        default = "" if field.default is None else f"`{_json(field.default)}`"
        lines.append(f"| `{field.name}` | {where} | {_value(field)} | {default} | {field.meaning} |")
    both = {name: NEUTRAL.get(name, ()) + CHAT_NEUTRAL.get(name, ()) for name in {**NEUTRAL, **CHAT_NEUTRAL}}
    neutral = [
        f"`{name}`" + (f" ({', '.join(f'`{_json(value)}`' for value in values)})" if values else "")
        for name, values in sorted(both.items())
    ]
    texts = (
        "Taken with the value that asks for nothing (in brackets; null always), refused with any other: ",
        "Without effect on an answer: ",
    )
    listed = (neutral, [f"`{name}`" for name in WITHOUT_EFFECT])
    for text, names in zip(texts, listed, strict=True):
        whole = text + ", ".join(names) + "."
        lines += ["", *textwrap.wrap(whole, 116, break_long_words=False, break_on_hyphens=False)]
    return "\n".join(lines)


def _value(field: Field) -> str:
    """What a field may be, in words."""
    kind = {"any": "", "bias": "object", "flag": "true, false", "ids": "token ids", "integer": "whole number"}
    return ", ".join(filter(None, (kind.get(field.kind, field.kind), field.limits)))


def _json(value: Any) -> str:
    return json.dumps(value)


def between(text: str, name: str, content: str) -> str:
    """The text with what stands between the markers of a table replaced."""
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + content + end + after
