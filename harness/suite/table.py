"""The table of a suite: per run entry and policy accuracy and throughput, then the whole suite and its peaks.

It knows scores and journals' answers; it does not know how either came to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.spec.record import Kind
from engine.units import format_bytes
from harness.suite.journal import Answer
from harness.suite.score import BITS_PER_BYTE, Score
from harness.text_table import markdown_table

SCHEMA = 1

CHAT_NOTES = {
    False: "Prompts are asked as they are (chat: off).",
    True: "Prompts are put into the tokenizer's chat template (chat: on).",
}
"""How prompts were asked, below the tables of suites, curves and comparisons."""


@dataclass(frozen=True)
class SuiteRow:
    """One run entry under one policy."""

    run_entry: str
    run_name: str
    policy: str
    model: str
    instances: int
    metric: str
    accuracy: float
    """Value of the metric, which is named beside it where it is not an accuracy; NaN where there is none."""

    low: float
    high: float
    """The 95 % interval of the metric."""

    interval: str
    requests: int
    """Different requests asked of the engine."""

    prompt_tokens: int
    generated_tokens: int
    seconds: float
    """Sum of the requests' shares of the passes they took part in; equal requests count once."""

    generated_per_second: float
    total_per_second: float
    """Generated, and prompt and generated, tokens per second."""

    kind: Kind


@dataclass(frozen=True)
class SuiteTotal:
    """The whole suite under one policy: what a stop-watch beside it shows."""

    policy: str
    requests: int
    """Different requests, each once, in however many run entries it is."""

    prompt_tokens: int
    generated_tokens: int
    seconds: float
    """Wall time of the passes that answered them."""

    load_seconds: float
    """Before the passes: reading, packing and placing the weights, in all sessions."""

    generated_per_second: float
    total_per_second: float
    """Generated, and prompt and generated, tokens per second of the passes."""

    process_peak: int | None
    """Most bytes of the whole process that were resident while the policy ran; None where it is not known."""


@dataclass(frozen=True)
class SuiteTable:
    """The content of table.json."""

    suite: str
    rows: Sequence[SuiteRow]
    peaks: Mapping[str, Mapping[str, int]]
    """Peak bytes by policy and tier."""

    chat: Literal["on", "off"] = "off"
    """Whether prompts were put into the tokenizer's chat template."""

    totals: Sequence[SuiteTotal] = ()
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


def make_row(
    run_entry: str, run_name: str, policy: str, model: str, score: Score, answers: Iterable[Answer]
) -> SuiteRow:
    """Put a run's score beside the throughput of its answers."""
    answers = list(answers)
    return SuiteRow(
        run_entry=run_entry,
        run_name=run_name,
        policy=policy,
        model=model,
        instances=score.instances,
        metric=score.metric,
        accuracy=score.value,
        low=score.low,
        high=score.high,
        interval=score.interval,
        **_speed(answers),
        kind="measured",
    )


def make_total(
    policy: str, answers: Iterable[Answer], load_seconds: float, process_peak: int | None
) -> SuiteTotal:
    """Sum up what a policy answered, each request once."""
    return SuiteTotal(policy, load_seconds=load_seconds, process_peak=process_peak, **_speed(list(answers)))


def _speed(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts, seconds and rates, as the fields of a row."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    generated = sum(len(answer.output.tokens) for answer in answers)
    seconds = sum(answer.seconds for answer in answers)
    return {
        "requests": len(answers),
        "prompt_tokens": prompt,
        "generated_tokens": generated,
        "seconds": seconds,
        "generated_per_second": generated / seconds if seconds else 0.0,
        "total_per_second": (prompt + generated) / seconds if seconds else 0.0,
    }


def to_markdown(
    rows: Sequence[SuiteRow],
    peaks: Mapping[str, Mapping[str, int]],
    totals: Sequence[SuiteTotal] = (),
    chat: bool = False,
) -> str:
    """The table as it is printed: aligned columns that are also Markdown.

    Args:
        totals: of every policy; none where they are not known.
        chat: whether prompts were put into the tokenizer's chat template.
    """
    entries = list(dict.fromkeys(row.run_entry for row in rows))
    ordered = sorted(rows, key=lambda row: entries.index(row.run_entry))  # stable: policies keep their order
    main = [
        (
            "run entry",
            "policy",
            "instances",
            "accuracy",
            "95 % interval",
            "generated token/s",
            "total token/s",
        )
    ]
    for row in ordered:
        named = "" if "match" in row.metric else f" {row.metric}"
        main.append((
            row.run_entry,
            row.policy,
            str(row.instances),
            f"{row.accuracy:.3f}{named}",
            f"{row.low:.3f} to {row.high:.3f}",
            *_rates(row),
        ))  # fmt: skip
    notes = ["Times are measured; accuracy is the run's main metric (exact match unless named)."]
    if totals:
        notes.append("The whole suite counts each request once; its seconds are wall time.")
    if any(row.metric == BITS_PER_BYTE for row in rows):
        notes.append("Of bits per byte, less is better.")
    notes.append(CHAT_NOTES[chat])
    parts = [markdown_table(main, left=2)]
    if totals:
        parts.append(markdown_table(_whole(totals), left=1))
    parts.append(markdown_table(_peaks(peaks, totals), left=1))
    return "\n\n".join(["\n".join(part) for part in parts] + [" ".join(notes)]) + "\n"


def _rates(row: SuiteRow | SuiteTotal) -> tuple[str, str]:
    """Generated and total tokens per second, as they are shown."""
    generated = f"{row.generated_per_second:,.1f}" if row.generated_tokens else "-"
    return generated, f"{row.total_per_second:,.1f}"


def _whole(totals: Sequence[SuiteTotal]) -> list[tuple[str, ...]]:
    head = ("whole suite", "requests", "loading", "passes", "generated token/s", "total token/s")
    rows = (
        (t.policy, f"{t.requests:,}", f"{t.load_seconds:,.2f} s", f"{t.seconds:,.2f} s", *_rates(t))
        for t in totals
    )
    return [head, *rows]


def _peaks(peaks: Mapping[str, Mapping[str, int]], totals: Sequence[SuiteTotal]) -> list[tuple[str, ...]]:
    """Peak bytes by tier, and of the process, which holds interpreter and libraries as well."""
    tiers = list(dict.fromkeys(tier for policy in peaks.values() for tier in policy))
    whole = {total.policy: total.process_peak for total in totals}
    head = ("peak bytes", *tiers, *(("process",) if whole else ()))
    rows = [head]
    for policy, peak in peaks.items():
        known = whole.get(policy)
        process = ("-" if known is None else format_bytes(known),) if whole else ()
        rows.append((policy, *(format_bytes(peak[tier]) for tier in tiers), *process))
    return rows
