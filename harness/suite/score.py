"""The main metric of a finished run with its 95 % interval, from HELM's own files.

It knows HELM's file formats (stats.json, per_instance_stats.json), not HELM's code.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import UsageError
from harness import statistics
from harness.files import require_json

ACCURACIES = (
    "exact_match",
    "quasi_exact_match",
    "exact_match_indicator",
    "final_number_exact_match",
    "prefix_exact_match",
    "quasi_prefix_exact_match",
    "math_equiv",
    "math_equiv_chain_of_thought",
    "RR@10",
    "f1_score",
    "rouge_2",
)
"""Main metrics: the first one that a run has is taken, else the first metric of its own, else the
log-probability. A run of language modelling is measured in bits per byte."""

_HOUSEKEEPING = ("num_", "finish_reason_", "inference_", "training_", "batch_size", "logprob", "max_prob",
                 "prompt_truncated", "predicted_index")  # fmt: skip

BITS_PER_BYTE = "bits_per_byte"

Interval = Literal["wilson", "bootstrap"]


@dataclass(frozen=True)
class Score:
    """A run's main metric over its unperturbed evaluation instances."""

    metric: str
    value: float
    low: float
    high: float
    """The 95 % interval."""

    interval: Interval
    instances: int


def read_score(run_folder: Path) -> Score:
    """Score a finished run.

    An instance's value is its mean over the train trials. Where all values are 0 or 1 the interval is
    Wilson's, otherwise the bootstrap's.

    Raises:
        UsageError: if the run has no metric that could be the main one.
    """
    per_instance = require_json(run_folder / "per_instance_stats.json")
    spec = require_json(run_folder / "run_spec.json")
    if spec["adapter_spec"]["method"] == "language_modeling":
        logprobs, sizes = (values_by_instance(per_instance, name) for name in ("logprob", "num_bytes"))
        bits = [-sum(logprobs[key]) / math.log(2) for key in logprobs]
        found = statistics.ratio(bits, [sum(sizes[key]) for key in logprobs])
        return Score(BITS_PER_BYTE, found.value, found.low, found.high, "bootstrap", len(bits))
    for metric in (*ACCURACIES, *_own_metrics(per_instance), "logprob"):
        values = [sum(trials) / len(trials) for trials in values_by_instance(per_instance, metric).values()]
        if values:
            found = statistics.mean(values)
            interval: Interval = "wilson" if statistics.is_right_or_wrong(values) else "bootstrap"
            return Score(metric, found.value, found.low, found.high, interval, len(values))
    raise UsageError(f"run {run_folder.name!r} has no metric with a value per instance")


def values_by_instance(per_instance: list[dict[str, Any]], metric: str) -> dict[str, list[float]]:
    """Means of one metric by instance, one per entry of the file (trials, or windows of a document)."""
    found: dict[str, list[float]] = defaultdict(list)
    for entry in per_instance:
        if "perturbation" in entry:
            continue
        for stat in entry["stats"]:
            if stat["name"]["name"] == metric and "mean" in stat:
                found[entry["instance_id"]].append(float(stat["mean"]))
    return found


def _own_metrics(per_instance: list[dict[str, Any]]) -> list[str]:
    """Names of the metrics that are not HELM's housekeeping, in the order of the file."""
    names = dict.fromkeys(stat["name"]["name"] for entry in per_instance for stat in entry["stats"])
    return [name for name in names if not name.startswith(_HOUSEKEEPING)]
