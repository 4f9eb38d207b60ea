"""The step after the answers: HELM scores the runs and writes their files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from engine.errors import UsageError
from harness.helm.translate import make_result
from harness.suite.manifest import Manifest, keep_manifest, package_version
from harness.suite.options import Suite
from harness.suite.policy_run import PolicyRun
from harness.suite.requests import RunRequests, SuiteRequests, request_identity
from harness.suite.score import read_score
from harness.suite.table import SuiteRow, SuiteTotal, make_row, make_total

if TYPE_CHECKING:
    from helm.common import request as helm

    from harness.helm.entries import SuiteRun


def score(
    suite: Suite, run: PolicyRun, requests: SuiteRequests, manifest: Manifest
) -> tuple[Manifest, dict[str, str]]:
    """Let HELM score the runs and write their files, save those that already are what they would be.

    A run that cannot be scored is noted and the others go on: their answers may have taken hours.

    Returns:
        The manifest with the runs that are scored now, and why others could not be, by their names.
    """
    from harness.helm.bridge import quiet

    progress, failures = suite.progress, dict[str, str]()
    pairs = list(zip(requests.runs[run.deployment.name], requests.asked, strict=True))
    wanted = {one.spec.name: _digest(one, asked) for one, asked in pairs}
    same = {name for name, digest in manifest.runs.items() if digest == wanted.get(name)}
    done = {name for name in same if suite.store.digest(name) == manifest.files.get(name, "none")}
    for name in sorted(same - done):
        progress.say(f"run {name}: files are missing or damaged and are made again from the journal")
    todo = [(one, asked) for one, asked in pairs if one.spec.name not in done]
    if todo:
        progress.begin(f"policy {run.policy.name}, scoring run entries", len(todo))
    for count, (one, asked) in enumerate(todo):
        progress.update(count, one.entry)
        if failure := run.failure(asked):
            failures[one.spec.name] = failure
            continue

        def result_of(request: helm.Request, asked: RunRequests = asked) -> helm.RequestResult:
            question = asked.questions[request_identity(request)]
            outputs = [run.journal.answers[run.key(key)].output for key in question.keys]
            return make_result(question, outputs, suite.text)

        try:
            with quiet(suite.store.log):
                files = requests.helm.replay(one, result_of)
        except UsageError as error:
            failures[one.spec.name] = str(error)
            continue
        manifest = manifest.with_run(one.spec.name, wanted[one.spec.name], files)
        keep_manifest(run.manifest, manifest)
    if todo:
        progress.end()
    return manifest, failures


def rows_of(
    suite: Suite, run: PolicyRun, requests: SuiteRequests, failures: Mapping[str, str]
) -> list[SuiteRow]:
    """The table's rows of a policy: accuracy from HELM's files, throughput from the journal."""
    return [
        make_row(
            run_entry=one.entry,
            run_name=one.spec.name,
            policy=run.policy.name,
            model=suite.options.model_name,
            score=read_score(suite.store.run(one.spec.name)),
            answers=[run.journal.answers[run.key(key)] for key in asked.requests()],
        )
        for one, asked in zip(requests.runs[run.deployment.name], requests.asked, strict=True)
        if one.spec.name not in failures
    ]


def total_of(run: PolicyRun, requests: SuiteRequests, manifest: Manifest) -> SuiteTotal:
    """The whole suite under a policy, by its journal and what its sessions recorded."""
    kept = run.journal.answers
    answers = [kept[key] for key in map(run.key, requests.different) if key in kept]
    loading = sum(session.totals.load_seconds for session in manifest.sessions)
    return make_total(run.policy.name, answers, loading, manifest.process_peak)


def _digest(run: SuiteRun, asked: RunRequests) -> str:
    """Identifies what a run's folder holds: if it is the same, HELM would write the same files."""
    content = (asked.digest, run.spec, sorted(asked.requests()), package_version("crfm-helm"))
    return hashlib.sha256(repr(content).encode()).hexdigest()
