"""Accuracy of one format over HELM's run entries, instance by instance, by the steps of a suite.

Every format is a suite of its own in ``<curve>/helm``, with journal, table and HELM's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from engine.errors import UsageError
from engine.spec.policy import Policy
from harness.engines.protocol import SweepEngine
from harness.files import require_json
from harness.helm.registry import slug
from harness.suite.options import SuiteOptions, open_suite
from harness.suite.policy_run import answer, open_run
from harness.suite.requests import build_requests
from harness.suite.runner import prepare, write
from harness.suite.score import ACCURACIES, values_by_instance
from harness.suite.scoring import rows_of, score, total_of
from harness.suite.table import SuiteRow
from harness.sweep.options import CurveOptions
from harness.sweep.points import EntryScore


@dataclass(frozen=True)
class Accuracy:
    """What HELM made of a format's answers."""

    entries: Sequence[EntryScore] = ()
    folders: Sequence[Path] = ()
    """Of the finished runs."""

    digests: Sequence[str] = ()
    """Of what each run was asked and how it is scored; they depend on the format's name, too."""


def run_entries(options: CurveOptions, policy: Policy, engine: SweepEngine, today: date) -> Accuracy:
    """Run the run entries under one format; what its journal holds is not asked again.

    Args:
        today: the day that a chat template shows.

    Raises:
        UsageError: if an entry cannot be built or scored.
    """
    if not (options.run_entries or options.conf_paths):
        return Accuracy()
    home = options.folder / "helm"
    suite_options = SuiteOptions(
        settings=options.settings,
        model_name=options.model_name,
        policies=[policy],
        suite=slug(policy.name),
        output_path=home,
        run_entries=options.run_entries,
        conf_paths=options.conf_paths,
        max_eval_instances=options.max_eval_instances,
        plugins=options.plugins,
        chat=options.chat,
        local_path=home / "prod_env",
        report=False,
        today=today,
    )
    with open_suite(suite_options) as suite:
        run = open_run(suite, policy, engine)
        requests = build_requests(suite, [run.deployment])
        prepare(suite, [run], requests)
        manifest, failures = score(suite, run, requests, answer(suite, run, requests))
        for failure in failures.values():
            raise UsageError(failure)
        rows = rows_of(suite, run, requests, failures)
        write(suite, rows, [total_of(run, requests, manifest)], {policy.name: manifest})
        folders = [suite.store.run(row.run_name) for row in rows]
    return Accuracy(
        entries=[_entry(row, folder) for row, folder in zip(rows, folders, strict=True)],
        folders=folders,
        digests=[manifest.runs[row.run_name] for row in rows],
    )


def _entry(row: SuiteRow, folder: Path) -> EntryScore:
    return EntryScore(
        entry=row.run_entry,
        metric=row.metric,
        is_accuracy=row.metric in ACCURACIES,
        value=row.accuracy,
        low=row.low,
        high=row.high,
        values=_values(folder, row.metric),
    )


def _values(folder: Path, metric: str) -> dict[str, float]:
    """The metric by unperturbed instance, the mean over its train trials."""
    per_instance = require_json(folder / "per_instance_stats.json")
    found = values_by_instance(per_instance, metric)
    return {instance: sum(values) / len(values) for instance, values in found.items()}
