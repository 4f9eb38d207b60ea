"""Accuracy of one format over HELM's run entries, instance by instance, through the suite's own runner.

Every format is a suite of its own in ``<curve>/helm``, with journal, table and HELM's files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UsageError
from engine.spec.policy import Policy
from harness.engines.protocol import SweepEngine
from harness.files import SuiteStore, read_json
from harness.helm.registry import slug
from harness.suite.options import SuiteOptions
from harness.suite.runner import run_suite
from harness.suite.score import ACCURACIES, values_by_instance
from harness.suite.table import Row
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


class _LentEngine:
    """An engine that a suite may use but not close, since more is measured with it."""

    def __init__(self, engine: SweepEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        """Left to its owner."""


def run_entries(options: CurveOptions, policy: Policy, engine: SweepEngine) -> Accuracy:
    """Run the run entries under one format; what its journal holds is not asked again.

    Raises:
        UsageError: if an entry cannot be built or scored.
    """
    if not (options.run_entries or options.conf_paths):
        return Accuracy()
    home = options.folder / "helm"
    suite = SuiteOptions(
        settings=options.settings,
        model_name=options.model_name,
        policies=[policy],
        suite=slug(policy.name),
        output_path=home,
        run_entries=options.run_entries,
        conf_paths=options.conf_paths,
        max_eval_instances=options.max_eval_instances,
        plugins=options.plugins,
        local_path=home / "prod_env",
        report=False,
    )
    result = run_suite(suite, lambda *_, **__: _LentEngine(engine))
    for failure in result.failures:
        raise UsageError(failure)
    folders = [result.folder / row.run_name for row in result.rows]
    manifest = read_json(SuiteStore(home, suite.suite).policy(suite.suite) / "manifest.json")
    return Accuracy(
        entries=[_entry(row, folder) for row, folder in zip(result.rows, folders, strict=True)],
        folders=folders,
        digests=[str(manifest["runs"][row.run_name]) for row in result.rows],
    )


def _entry(row: Row, folder: Path) -> EntryScore:
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
    per_instance = json.loads((folder / "per_instance_stats.json").read_text(encoding="utf-8"))
    found = values_by_instance(per_instance, metric)
    return {instance: sum(values) / len(values) for instance, values in found.items()}
