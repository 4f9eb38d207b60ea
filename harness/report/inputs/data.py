"""The nouns of a report: suites, results, policies and what their passes did.

None stands for what is not known. It does not know files, nor how anything is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.spec.record import Kind, StreamRecord, TierRecord
from harness.suite.score import BITS_PER_BYTE

NOT_RECORDED = "not recorded"
"""Shown where a figure is not known."""

TENSOR_KINDS = ("weights", "kv", "state", "activations")


class _Counted:
    """Tokens, and the seconds of the passes that computed them: of a request its shares of them."""

    prompt_tokens: int
    generated_tokens: int
    seconds: float

    @property
    def generated_per_second(self) -> float | None:
        """Generated tokens per second, loading not counted; None where there are none."""
        return self.generated_tokens / self.seconds if self.generated_tokens and self.seconds else None

    @property
    def total_per_second(self) -> float | None:
        """Prompt and generated tokens likewise."""
        count = self.prompt_tokens + self.generated_tokens
        return count / self.seconds if count and self.seconds else None


@dataclass(frozen=True)
class Result(_Counted):
    """One run entry under one policy: a row of table.json."""

    run_entry: str
    run_name: str
    policy: str
    metric: str
    accuracy: float | None
    low: float | None
    high: float | None
    """The metric and its 95 % interval; None where it was not to be had."""

    interval: str
    instances: int
    requests: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    kind: Kind
    folder: Path | None = None
    """Of HELM's files of this run; None where it is not known or not there."""

    @property
    def value(self) -> float | None:
        """Of the metric."""
        return self.accuracy

    @property
    def is_accuracy(self) -> bool:
        """Whether it lies between 0 and 1 and more is better, so that it can be averaged with others."""
        return self.metric != BITS_PER_BYTE and self.value is not None and 0 <= self.value <= 1


@dataclass(frozen=True)
class ResultTable:
    """The content of table.json."""

    suite: str
    rows: tuple[Result, ...]


@dataclass(frozen=True)
class StoredSpan:
    """One job on one stream; seconds since the excerpt begins."""

    stream: str
    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Excerpt:
    """A stretch of a policy's trace: one pass, or its beginning where it has very many steps."""

    spans: tuple[StoredSpan, ...]
    seconds: float
    """Length of the stretch that is shown."""

    passes: int
    """Passes that the trace holds."""

    whole: bool
    """Whether the pass is shown to its end."""


@dataclass(frozen=True)
class PolicyResult(_Counted):
    """All that is known of one policy's passes: its manifest and its trace."""

    name: str
    kind: str
    """measured, simulated or projected."""

    definition: Mapping[str, str]
    placement: Mapping[str, Mapping[str, float]]
    """Achieved fractions, by kind of tensor and tier; none if the recorded session answered nothing."""

    tiers: Mapping[str, TierRecord]
    streams: Mapping[str, StreamRecord]
    requests: int
    passes: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    load_seconds: float
    sessions: int
    """Runs of the engine that the sums come from; more than one where a suite was continued."""

    model: Mapping[str, str]
    hardware: Mapping[str, str]
    software: Mapping[str, str]
    provenance: Mapping[str, str]
    """Command, time of creation, seeds, memory of the process."""

    excerpt: Excerpt | None
    """None where no trace was stored."""

    stored: Mapping[str, str] = field(default_factory=dict)
    """Bytes of weights and KV cache as kept, and what computes with them."""

    predicted: Mapping[str, float] = field(default_factory=dict)
    """What the planner expected, by the dotted name of the figure in the engine's record."""

    measured: Mapping[str, float] = field(default_factory=dict)
    """Every number of the engine's record by its dotted name, to set beside `predicted`."""


@dataclass(frozen=True)
class SuiteResults:
    """One suite, its policies in the order of its table."""

    suite: str
    results: tuple[Result, ...]
    policies: tuple[PolicyResult, ...]

    @property
    def run_entries(self) -> list[str]:
        """In the order of the table."""
        return list(dict.fromkeys(result.run_entry for result in self.results))

    def result(self, run_entry: str, policy: str) -> Result | None:
        """The row of a run entry and a policy."""
        return next((r for r in self.results if (r.run_entry, r.policy) == (run_entry, policy)), None)


def merge(suites: Sequence[SuiteResults]) -> SuiteResults:
    """Several suites as one, policies named ``suite/policy``; one suite is returned as it is.

    The suites' names must differ.
    """
    if len(suites) == 1:
        return suites[0]
    return SuiteResults(
        " + ".join(suite.suite for suite in suites),
        tuple(replace(r, policy=f"{s.suite}/{r.policy}") for s in suites for r in s.results),
        tuple(replace(p, name=f"{s.suite}/{p.name}") for s in suites for p in s.policies),
    )
