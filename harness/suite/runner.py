"""Runs a suite: many run entries, one model, one or more policies, each with one call to the engine.

In order: describe the model, build all requests, create all metrics, check every policy's memory, and only
then load weights; per policy answer what the journal misses, let HELM score the runs and write their files;
at the end the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import PolicyError
from engine.files.whole import write_whole
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.settings import EngineSettings
from engine.units import format_bytes
from harness.engines.auto import is_auto, predicted_table, resolve_policy
from harness.engines.protocol import EngineFactory, EngineLike, OnNotice
from harness.files import write_json
from harness.helm.registry import slug, write_prod_env
from harness.suite.gate import check_accepted
from harness.suite.manifest import Manifest, read_manifest
from harness.suite.options import Suite, SuiteOptions, open_suite
from harness.suite.policy_run import PolicyRun, answer, open_run
from harness.suite.requests import SuiteRequests, build_requests
from harness.suite.scoring import rows_of, score, total_of
from harness.suite.table import SuiteRow, SuiteTable, SuiteTotal, to_markdown


@dataclass(frozen=True)
class SuiteResult:
    """What a suite leaves behind."""

    folder: Path
    """Of the suite's runs, policies and table."""

    reports: Path
    """Where its report belongs."""

    rows: Sequence[SuiteRow]
    """The table's rows, without runs that could not be scored; none after a dry run."""

    shown: str
    """What is printed: the table, or what a dry run found."""

    failures: Sequence[str] = ()
    """One line per run that could not be scored; its answers are in the journal."""


def make_engine(settings: EngineSettings, policy: Policy, on_notice: OnNotice) -> EngineLike:
    """Our own engine."""
    from engine.engine import Engine

    return Engine(settings, policy, on_notice)


def run_suite(options: SuiteOptions, factory: EngineFactory = make_engine) -> SuiteResult:
    """Run a suite, or with ``dry_run`` only say what it would ask and hold.

    Args:
        factory: makes the engine of a policy.

    Raises:
        TierbenchError: for every error that a user can cause.
    """
    names = [slug(policy.name) for policy in options.policies]
    if len(set(names)) < len(names):
        raise PolicyError(f"two policies have one name among {', '.join(names)}: name them with name=...")
    with open_suite(options) as suite:
        runs = [open_run(suite, policy, _open(suite, policy, factory)) for policy in options.policies]
        requests = build_requests(suite, [run.deployment for run in runs])
        for run in runs:
            if is_auto(run.policy):
                _find_policy(suite, run, requests, factory)
        if options.dry_run:
            return SuiteResult(suite.store.folder, suite.store.reports, [], dry_run_text(runs, requests))
        prepare(suite, runs, requests)
        rows: list[SuiteRow] = []
        totals: list[SuiteTotal] = []
        failures: dict[str, str] = {}
        manifests: dict[str, Manifest] = {}
        for run in runs:
            manifest = answer(suite, run, requests)
            run.engine.close()  # its weights go before the next policy's come
            manifests[run.policy.name], unscored = score(suite, run, requests, manifest)
            failures |= unscored
            rows += rows_of(suite, run, requests, failures)
            totals.append(total_of(run, requests, manifest))
        shown = write(suite, rows, totals, manifests)
        return SuiteResult(suite.store.folder, suite.store.reports, rows, shown, list(failures.values()))


def prepare(suite: Suite, runs: Sequence[PolicyRun], requests: SuiteRequests) -> None:
    """Before anything is answered: HELM's configuration, and the memory that every policy would take.

    Raises:
        BudgetError: if a policy's block does not fit its budgets.
    """
    write_prod_env(suite.options.local_path, [run.deployment for run in runs])
    for run in runs:
        for line in run.kept(requests.different):
            suite.progress.say(line)
        run.refuse(requests.different)


def write(
    suite: Suite,
    rows: Sequence[SuiteRow],
    totals: Sequence[SuiteTotal],
    manifests: Mapping[str, Manifest],
) -> str:
    """Write the table; returns it as it is printed.

    Args:
        totals: of every policy.
        manifests: by policy.
    """
    peaks = {name: manifest.peak_bytes for name, manifest in manifests.items()}
    shown = to_markdown(rows, peaks, totals, suite.chat)
    shown += predicted_table({name: manifest.engine for name, manifest in manifests.items()})
    table = SuiteTable(suite.options.suite, rows, peaks, "on" if suite.chat else "off", totals)
    write_json(suite.store.folder / "table.json", table.to_json())
    write_whole(suite.store.folder / "table.md", shown)
    return shown


def dry_run_text(runs: Sequence[PolicyRun], requests: SuiteRequests) -> str:
    """What would be asked, and what each policy would hold."""
    lines = ["run entry: instances, requests, prompt tokens, at most generated tokens"]
    for asked in requests.asked:
        own = asked.requests().values()
        prompt, new = sum(len(r.prompt) for r in own), sum(r.max_new_tokens for r in own)
        lines.append(f"  {asked.entry}: {asked.instances:,}, {len(own):,}, {prompt:,}, {new:,}")
    lines.append(requests.prompts)
    for run in runs:
        plan = run.engine.check(list(requests.different.values()))
        if plan is None:
            continue
        lines.append(f"policy {run.policy.name}, peak memory:")
        for tier in Tier:
            uses = [f"{use} {format_bytes(count)}" for use, count in plan.tiers[tier].items()]
            detail = f" ({', '.join(uses)})" if uses else ""
            lines.append(f"  {tier.value}: {format_bytes(plan.total(tier))}{detail}")
    return "\n".join(lines) + "\n"


def _open(suite: Suite, policy: Policy, factory: EngineFactory) -> EngineLike:
    """The engine of a policy, closed with the suite at the latest."""
    options = suite.options
    engine = factory(options.settings, policy, suite.progress.say)
    suite.closing.callback(engine.close)
    if options.only_accepted is not None:
        check_accepted(policy, options.only_accepted, engine.spec.digest)
    return engine


def _find_policy(suite: Suite, run: PolicyRun, requests: SuiteRequests, factory: EngineFactory) -> None:
    """Have the planner find a run's policy, or go on with the one that some answers were given with."""
    before = read_manifest(run.manifest)
    found = resolve_policy(
        suite.options.settings, run.policy, list(requests.different.values()), suite.progress.say,
        before.engine if before else None,
    )  # fmt: skip
    run.engine.close()
    run.policy, run.predicted = found.policy, found.predicted
    run.engine = _open(suite, found.policy, factory)
