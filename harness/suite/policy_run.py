"""One policy's run of a suite: its engine answers what its journal misses."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from engine.errors import BudgetError, storage_errors
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord, PredictionRecord
from engine.spec.request import CallProgress, Output, Request
from harness.engines.protocol import EngineLike
from harness.files import read_json, write_json
from harness.helm.registry import Deployment, make_deployment, slug
from harness.identity import SHORT, Identity, identity_of, since
from harness.progress.view import Watch
from harness.suite.bounds import with_bounds
from harness.suite.journal import Answer, Journal
from harness.suite.manifest import Manifest, keep_manifest, make_manifest, read_manifest, unfinished
from harness.suite.options import Suite
from harness.suite.requests import RunRequests, SuiteRequests

_RECORD_SECONDS = 1.0
"""How often the manifest is written while the engine works."""


class ManifestWriter(Protocol):
    """Writes the manifest with a record of the engine; with a copy where the record is ``final``."""

    def __call__(self, record: EngineRecord, final: bool = False) -> Manifest:
        """Returns what is written."""
        ...


@dataclass
class PolicyRun:
    """One policy's run of a suite."""

    policy: Policy
    engine: EngineLike
    deployment: Deployment
    folder: Path
    journal: Journal
    identify: Callable[[Policy, EngineLike], Identity]
    """Finds `identity`."""

    refused: dict[str, str] = field(default_factory=dict)
    """Why a request cannot be answered within the budgets, whatever else is answered beside it."""

    predicted: PredictionRecord | None = None
    """What the planner predicted of a policy that it found."""

    @property
    def trace(self) -> Path:
        """When each stream was busy, in the last session."""
        return self.folder / "trace.json"

    @cached_property
    def identity(self) -> Identity:
        """All that the answers and their times depend on besides the requests; weights are read for it.

        It is found when answers are looked for, after the policy has been, and not for a dry run.
        """
        return self.identify(self.policy, self.engine)

    @property
    def manifest(self) -> Path:
        """The file that describes the results."""
        return self.folder / "manifest.json"

    def record(self) -> EngineRecord:
        """The engine's record, with the planner's prediction beside it."""
        return replace(self.engine.record(), predicted=self.predicted)

    def key(self, request_key: str) -> str:
        """Under which an answer is kept in the journal."""
        return f"{self.identity.short}-{request_key}"

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

    def failure(self, run: RunRequests) -> str:
        """Why a run cannot be scored: some of its requests are refused; empty if none is."""
        keys = [key for key in run.requests() if key in self.refused]
        if not keys:
            return ""
        return (
            f"run entry {run.entry!r}, policy {self.policy.name}: {len(keys):,} of {len(run.requests()):,} "
            f"requests are not answered; one of them has {self.refused[keys[0]]}"
        )

    def kept(self, requests: Mapping[str, Request]) -> Iterator[str]:
        """One line for each thing to know about the answers that are there already."""
        journal, name = self.journal, self.policy.name
        reused = sum(self.key(key) in journal.answers for key in requests)
        if reused:
            yield f"policy {name}: {reused:,} of {len(requests):,} requests are answered already"
        foreign = Counter(key[:SHORT] for key in journal.answers)
        del foreign[self.identity.short]
        before = read_manifest(self.manifest) if foreign else None
        for short, count in foreign.items():
            parts = before.identities.get(short) if before else None
            changed = self.identity.changed_from(parts) if parts else []
            why = since(changed) if changed else ": no manifest says any longer what they are of"
            yield f"policy {name}: {count:,} kept answers are not used{why}"
        if journal.damaged:
            yield f"policy {name}: {journal.complaint('is asked again')}"
        if self.trace.exists() and read_json(self.trace) is None:
            yield f"policy {name}: {self.trace} is damaged and is removed; it only holds times"
            with storage_errors(self.trace, "remove"):
                self.trace.unlink()


def open_run(suite: Suite, policy: Policy, engine: EngineLike) -> PolicyRun:
    """A policy's run in a suite, with the journal of earlier sessions; the engine stays its maker's."""
    options = suite.options
    folder = suite.store.policy(slug(policy.name))
    deployment = make_deployment(
        options.settings, policy, engine.spec, options.model_name, suite.text, options.forbid_truncation,
        suite.chat,
    )  # fmt: skip
    known = engine.spec.vocab_size
    journal = suite.closing.enter_context(Journal(folder / "journal.jsonl", known))

    def identify(policy: Policy, engine: EngineLike) -> Identity:
        return identity_of(engine.record(), policy, options.settings.seed, suite.text, with_times=True)

    return PolicyRun(policy, engine, deployment, folder, journal, identify)


def answer(suite: Suite, run: PolicyRun, requests: SuiteRequests) -> Manifest:
    """Have the engine answer in one call what the journal misses; returns the manifest, which is written.

    Raises:
        StorageError: if a tier fails; what was answered is in the journal.
    """
    missing = run.missing(requests.different)
    write = _manifest_writer(suite, run, requests, ran=bool(missing))
    if not missing:
        return write(run.record(), final=True)
    progress, keys, asked = suite.progress, [run.key(key) for key in missing], list(missing.values())
    watch = _watch(run, requests, missing)
    written, passes = float("-inf"), 0

    def on_output(index: int, output: Output) -> None:
        watch.finished(index, output)
        run.journal.keep(keys[index], Answer(output, len(asked[index].prompt)))

    def on_progress(state: CallProgress) -> None:
        nonlocal written, passes
        is_first = state.passes > 0 and not passes
        if is_first or time.monotonic() - written > _RECORD_SECONDS:
            write(unfinished(run.record(), state))  # what a killed process leaves behind
            written, passes = time.monotonic(), state.passes
        progress.show(watch.view(state))

    progress.say(f"policy {run.policy.name}: answering {len(asked):,} requests")
    progress.begin(f"policy {run.policy.name}, requests", len(asked))
    outputs = run.engine.answer(asked, on_output=on_output, on_progress=on_progress)
    progress.end()
    run.journal.close()
    run.engine.trace.write_chrome(run.trace)
    record = with_bounds(run.record(), run.engine, asked, outputs, suite.options.settings.device)
    return write(record, final=True)


def _manifest_writer(suite: Suite, run: PolicyRun, requests: SuiteRequests, ran: bool) -> ManifestWriter:
    """Writes the manifest with the engine's record and returns it."""
    before = read_manifest(run.manifest)
    if run.manifest.exists() and read_json(run.manifest) is None:
        suite.progress.say(f"{run.manifest} is damaged and is made again")

    def write(record: EngineRecord, final: bool = False) -> Manifest:
        manifest = make_manifest(
            suite=suite.options.suite,
            policy=run.policy.name,
            identity=run.identity,
            run_entries=[asked.entry for asked in requests.asked],
            seed=suite.options.settings.seed,
            record=record,
            chat=suite.chat,
        ).continuing(before, ran)
        if final:
            keep_manifest(run.manifest, manifest)
        else:
            write_json(run.manifest, manifest.to_json())
        return manifest

    return write


def _watch(run: PolicyRun, requests: SuiteRequests, missing: Mapping[str, Request]) -> Watch:
    """Follows the call that answers what is missing, by run entry."""
    places = {key: place for place, key in enumerate(missing)}
    entries: dict[str, list[int]] = {}
    answered: dict[str, int] = {}
    for asked in requests.asked:
        keys = asked.requests()
        entries.setdefault(asked.entry, []).extend(places[key] for key in keys if key in places)
        answered[asked.entry] = answered.get(asked.entry, 0) + sum(key not in places for key in keys)
    return Watch(run.policy.name, list(missing.values()), run.policy.block_size, entries, answered)
