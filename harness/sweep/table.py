"""The table of a curve as text, CSV and JSON.

It knows rows and points; nothing is computed here but the figures of single run entries.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from engine.spec.hardware import Tier
from engine.units import format_bytes
from harness.statistics import Verdict
from harness.suite.table import CHAT_NOTES
from harness.sweep.paper import PUBLISHED, SOURCE
from harness.sweep.points import Point
from harness.sweep.rows import FormatRow
from harness.text_table import markdown_table

SCHEMA = 1

_CROWDED = 0.2
"""Cores of other processes from which on a table says that there were some."""


def to_json(
    suite: str, rows: Sequence[FormatRow], points: Sequence[Point], accept: float, published: bool
) -> Any:
    """The content of curve.json, which `harness.suite.gate` reads."""
    return {
        "schema": SCHEMA,
        "suite": suite,
        "kind": "measured",
        "accept": accept,
        "cheapest": next((row.format for row in rows if row.cheapest), None),
        "model": asdict(points[0].engine.model),
        "asked": points[0].asked,
        "rows": [_row_json(row, point) for row, point in zip(rows, points, strict=True)],
        "published": [asdict(figure) | {"source": SOURCE} for figure in PUBLISHED] if published else [],
    }


def to_csv(rows: Sequence[FormatRow]) -> str:
    """One line per format; the columns are the fields of `harness.sweep.rows.FormatRow`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(FormatRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.to_dict() for row in rows)
    return text.getvalue()


def to_markdown(rows: Sequence[FormatRow], points: Sequence[Point], accept: float, published: bool) -> str:
    """The tables as they are printed: aligned columns that are also Markdown."""
    parts: list[list[str]] = []
    if rows[0].accuracy is not None:
        parts += [markdown_table(_accuracy(rows), left=1), markdown_table(_by_entry(points), left=1)]
    parts += [markdown_table(_likelihoods(rows), left=1), markdown_table(_storage(rows, points[0]), left=3)]
    if published:
        parts.append(markdown_table(_published(rows, points[0]), left=3))
    notes = [*_notes(rows, points[0], accept), *([f"Published: {SOURCE}."] if published else [])]
    return "\n".join(["\n\n".join("\n".join(part) for part in parts), "", *notes, ""])


def _row_json(row: FormatRow, point: Point) -> dict[str, Any]:
    entries = [{k: v for k, v in asdict(entry).items() if k != "values"} for entry in point.entries]
    engine = point.engine.to_json()
    own = {key: engine[key] for key in ("model", "hardware", "software")}
    about = {"created": point.created, "seconds": point.seconds, "policy": dict(point.policy)}
    return {**row.to_dict(), "entries": entries, "storage": asdict(point.storage), **about, **own}


def _accuracy(rows: Sequence[FormatRow]) -> list[tuple[str, ...]]:
    shown: list[tuple[str, ...]] = [
        ("format", "bits", "instances", "accuracy", "95 % interval", "change", "95 % interval",
         "keeps at least", "gate")
    ]  # fmt: skip
    for row in rows:
        shown.append((
            row.format,
            f"{row.bits:.2f}",
            str(row.instances),
            _number(row.accuracy),
            _interval(row.accuracy_low, row.accuracy_high),
            "" if row.verdict is Verdict.REFERENCE else _number(row.change, "+.3f"),
            _interval(row.change_low, row.change_high, "+.3f"),
            "" if row.verdict is Verdict.REFERENCE else _number(row.retained_low),
            f"{row.verdict.value}, cheapest" if row.cheapest else row.verdict.value,
        ))  # fmt: skip
    return shown


def _by_entry(points: Sequence[Point]) -> list[tuple[str, ...]]:
    names = [entry.entry for entry in points[0].entries]
    values = [{entry.entry: entry.value for entry in point.entries} for point in points]
    rows = ((p.name, *(_number(v.get(n)) for n in names)) for p, v in zip(points, values, strict=True))
    return [("format", *names), *rows]


def _likelihoods(rows: Sequence[FormatRow]) -> list[tuple[str, ...]]:
    """Columns of what was measured only."""
    columns: list[tuple[str, list[str]]] = [("format", [row.format for row in rows])]
    if rows[0].answer_nll is not None:
        columns += [
            ("answer NLL", [_number(row.answer_nll, ".4f") for row in rows]),
            ("change", [_number(row.answer_nll_change, "+.4f") for row in rows]),
            (
                "95 % interval",
                [_interval(row.answer_nll_change_low, row.answer_nll_change_high, "+.4f") for row in rows],
            ),
        ]
    if rows[0].perplexity is not None:
        columns += [
            ("perplexity", [_number(row.perplexity, ".4g") for row in rows]),
            ("bits/token", [_number(row.text_bits_per_token, ".4f") for row in rows]),
        ]
    if rows[0].last_word_accuracy is not None:
        columns += [
            ("last word", [_number(row.last_word_accuracy) for row in rows]),
            ("95 % interval", [_interval(row.last_word_low, row.last_word_high) for row in rows]),
            ("last-word NLL", [_number(row.last_word_nll) for row in rows]),
        ]
    if any(row.kl is not None for row in rows):
        columns += [
            ("KL", [_number(row.kl, ".2e") for row in rows]),
            ("top token agrees", [_number(row.agreement, ".4f") for row in rows]),
        ]
    return list(zip(*([title, *cells] for title, cells in columns), strict=True))


def _storage(rows: Sequence[FormatRow], reference: Point) -> list[tuple[str, ...]]:
    shape = f"{reference.storage.block_prompt}/{reference.storage.block_new}"
    shown: list[tuple[str, ...]] = [
        ("format", "weights", "KV cache", "bits/weight", "bits/KV value", "bytes/parameter", "KV bytes/token",
         f"largest block {shape}", "generated token/s", "range")
    ]  # fmt: skip
    for row in rows:
        sparse = f", {row.attention_fraction:g} attended" if row.attention_fraction < 1 else ""
        shown.append((
            row.format,
            row.weight_quant,
            row.kv_quant + sparse,
            f"{row.weight_bits:.2f}",
            f"{row.kv_bits:.2f}",
            f"{row.bytes_per_parameter:.3f}",
            f"{row.kv_bytes_per_token:,.0f}",
            f"{row.largest_block:,}",
            _number(row.tokens_per_second, ",.1f"),
            _interval(row.slowest, row.fastest, ",.1f") if row.repeats != 1 else "one round",
        ))  # fmt: skip
    return shown


def _published(rows: Sequence[FormatRow], reference: Point) -> list[tuple[str, ...]]:
    head = ("model", "format", "kind", "LAMBADA accuracy", "WikiText perplexity")
    name = " + ".join(Path(part).name for part in reference.engine.model.path.split(" + "))
    figures = [
        *((f.model, f.format, f.kind, f.lambada_accuracy, f.wikitext_perplexity) for f in PUBLISHED),
        *((name, row.format, row.kind, row.last_word_accuracy, row.perplexity) for row in rows),
    ]
    return [
        head,
        *((*about, _number(found), _number(perplexity, ".2f")) for *about, found, perplexity in figures),
    ]


def _notes(rows: Sequence[FormatRow], reference: Point, accept: float) -> list[str]:
    about = ["All figures are measured."]
    if rows[0].accuracy is not None:
        chosen = next((row.format for row in rows if row.cheapest), "none, the instances do not show it")
        about.append(
            f"Gate: accepted where at least {accept:g} of full precision's accuracy is kept with 95 % "
            f"confidence (paired bootstrap over instances); cheapest accepted: {chosen}."
        )
        about.append(CHAT_NOTES[reference.asked.get("chat") == "on"])
    if rows[0].answer_nll is not None:
        about.append(f"Answer NLL: nats per token of {rows[0].answer_tokens:,} tokens of correct answers.")
    if rows[0].perplexity is not None:
        about.append(f"Perplexity: of {rows[0].text_tokens:,} tokens of running text.")
    if compared := max(row.compared_tokens for row in rows):
        about.append(f"KL(full || format) in nats and agreement: mean over {compared:,} positions.")
    if speed := reference.speed:
        about.append(
            f"token/s: {speed.sequences} sequences, {speed.prompt_tokens:,} prompt tokens and "
            f"{speed.new_tokens} new tokens each, median and range of {len(speed.rates)} rounds over all."
        )
    about += _conditions(rows, reference)
    block = reference.storage.block_size
    about.append(f"bits: of the weights and the KV cache of {block} sequences together, as stored.")
    return about


def _conditions(rows: Sequence[FormatRow], reference: Point) -> list[str]:
    """Under what conditions what a column compares was measured, where they were not the same."""
    about, storage = [], reference.storage
    if held := storage.limits.get(Tier.HOST):
        about.append(f"Largest block: of every format within {format_bytes(held)} of host memory.")
    times = dict.fromkeys(row.speed_began for row in rows if row.repeats)
    if len(times) > 1:
        named = (
            (began, ", ".join(row.format for row in rows if row.speed_began == began)) for began in times
        )
        groups = "; ".join(f"{names} {began or 'at an unknown time'}" for began, names in named)
        about.append(f"token/s were measured at different times, compare them with care: {groups}.")
    crowded = [row for row in rows if (row.other_cores or 0) > _CROWDED]
    if crowded:
        most = ", ".join(f"{row.format} {row.other_cores:.1f}" for row in crowded)
        about.append(f"Other processes kept cores busy while token/s were measured, at most: {most}.")
    return about


def _number(value: float | None, spec: str = ".3f") -> str:
    return "-" if value is None or value != value else format(value, spec)


def _interval(low: float | None, high: float | None, spec: str = ".3f") -> str:
    return "" if low is None or high is None else f"{low:{spec}} to {high:{spec}}"
