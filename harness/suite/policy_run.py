"""One policy's part of a suite: its engine, its journal, and which requests it cannot take at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import BudgetError
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.request import Request
from engine.units import format_bytes
from harness.engines.protocol import EngineLike
from harness.helm.registry import Deployment
from harness.suite.journal import Journal
from harness.suite.requests import AskedRun

if TYPE_CHECKING:
    from harness.helm.entries import SuiteRun


@dataclass
class PolicyPart:
    """One policy's part of a suite."""

    policy: Policy
    engine: EngineLike
    deployment: Deployment
    identity: str
    folder: Path
    journal: Journal
    runs: list[SuiteRun] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Why a request cannot be answered within the budgets, whatever else is answered beside it."""

    def key(self, request_key: str) -> str:
        """Under which an answer is kept in the journal."""
        return f"{self.identity[:16]}-{request_key}"

    def missing(self, requests: Mapping[str, Request]) -> dict[str, Request]:
        """The requests that the journal holds no answer to, without those that are refused."""
        known = self.journal.answers
        return {
            key: request
            for key, request in requests.items()
            if self.key(key) not in known and key not in self.refused
        }

    def refuse(self, requests: Mapping[str, Request]) -> None:
        """Set requests aside that exceed a budget by themselves, so that the others can be answered.

        Raises:
            BudgetError: if what is left does not fit together: the block is too large, not a request.
            RequestError: if the model cannot take a request.
        """
        missing = self.missing(requests)
        if not missing:
            return
        try:
            self.engine.check(list(missing.values()))
            return
        except BudgetError:
            reasons: dict[tuple[int, int, bool], str] = {}
            for key, request in missing.items():
                shape = len(request.prompt), request.max_new_tokens, request.prompt_logprobs
                if shape not in reasons:
                    reasons[shape] = self._reason(request)
                if reasons[shape]:
                    self.refused[key] = reasons[shape]
            if not self.refused:
                raise
        if rest := self.missing(requests):
            self.engine.check(list(rest.values()))

    def _reason(self, request: Request) -> str:
        try:
            self.engine.check([request])
        except BudgetError as error:
            return (
                f"{len(request.prompt):,} prompt tokens and {request.max_new_tokens:,} to generate: {error}"
            )
        return ""

    def failure(self, run: AskedRun) -> str:
        """Why a run cannot be scored: some of its requests are refused; empty if none is."""
        keys = [key for key in run.requests() if key in self.refused]
        if not keys:
            return ""
        return (
            f"run entry {run.entry!r}, policy {self.policy.name}: {len(keys):,} of {len(run.requests()):,} "
            f"requests are not answered; one of them has {self.refused[keys[0]]}"
        )

    def kept(self, requests: Mapping[str, Request]) -> Iterator[str]:
        """What is to be said of the answers that are there already."""
        journal, name = self.journal, self.policy.name
        reused = sum(self.key(key) in journal.answers for key in requests)
        foreign = sum(not key.startswith(self.identity[:16]) for key in journal.answers)
        if reused:
            yield f"policy {name}: {reused:,} of {len(requests):,} requests are answered already"
        if foreign:
            yield (
                f"policy {name}: {foreign:,} kept answers are of another model, policy, device "
                "or seed and are not used"
            )
        if journal.damaged:
            yield f"policy {name}: {journal.damaged:,} damaged lines of {journal.path} are ignored"


def dry_run_text(
    asked: Sequence[AskedRun], parts: Sequence[PolicyPart], requests: Mapping[str, Request]
) -> str:
    """What would be asked, and what each policy would hold."""
    lines = ["run entry: instances, requests, prompt tokens, at most generated tokens"]
    for run in asked:
        own = run.requests().values()
        prompt, new = sum(len(r.prompt) for r in own), sum(r.max_new_tokens for r in own)
        lines.append(f"  {run.entry}: {run.instances:,}, {len(own):,}, {prompt:,}, {new:,}")
    for part in parts:
        plan = part.engine.check(list(requests.values()))
        lines.append(f"policy {part.policy.name}, most bytes held:")
        for tier in Tier:
            uses = [f"{use} {format_bytes(count)}" for use, count in plan.tiers[tier].items()]
            detail = f" ({', '.join(uses)})" if uses else ""
            lines.append(f"  {tier.value}: {format_bytes(plan.total(tier))}{detail}")
    return "\n".join(lines) + "\n"
