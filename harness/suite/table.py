"""The table of a suite: per run entry and policy accuracy and throughput, then peak bytes per tier.

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
    False: "Prompts were asked as they are (chat: off).",
    True: "Prompts were put into the tokenizer's chat template (chat: on).",
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
class SuiteTable:
    """The content of table.json."""

    suite: str
    rows: Sequence[SuiteRow]
    peaks: Mapping[str, Mapping[str, int]]
    """Peak bytes by policy and tier."""

    chat: Literal["on", "off"] = "off"
    """Whether prompts were put into the tokenizer's chat template."""

    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


def make_row(
    run_entry: str, run_name: str, policy: str, model: str, score: Score, answers: Iterable[Answer]
) -> SuiteRow:
    """Put a run's score beside the throughput of its answers."""
    answers = list(answers)
    prompt = sum(answer.prompt_tokens for answer in answers)
    generated = sum(len(answer.output.tokens) for answer in answers)
    seconds = sum(answer.seconds for answer in answers)
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
        requests=len(answers),
        prompt_tokens=prompt,
        generated_tokens=generated,
        seconds=seconds,
        generated_per_second=generated / seconds if seconds else 0.0,
        total_per_second=(prompt + generated) / seconds if seconds else 0.0,
        kind="measured",
    )


def to_markdown(rows: Sequence[SuiteRow], peaks: Mapping[str, Mapping[str, int]], chat: bool = False) -> str:
    """The table as it is printed: aligned columns that are also Markdown.

    Args:
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
            f"{row.generated_per_second:,.1f}" if row.generated_tokens else "-",
            f"{row.total_per_second:,.1f}",
        ))  # fmt: skip
    tiers = list(dict.fromkeys(tier for policy in peaks.values() for tier in policy))
    held = [("peak bytes", *tiers)]
    held += [(policy, *(format_bytes(peak[tier]) for tier in tiers)) for policy, peak in peaks.items()]
    notes = ["Times are measured; accuracy is the run's main metric (exact match unless named)."]
    if any(row.metric == BITS_PER_BYTE for row in rows):
        notes.append("Of bits per byte, less is better.")
    notes.append(CHAT_NOTES[chat])
    return "\n".join(
        [*markdown_table(main, left=2), "", *markdown_table(held, left=1), "", " ".join(notes), ""]
    )
