"""Reads what HELM stored of single instances: values of a run's main metric, prompts and answers.

It knows HELM's file formats (per_instance_stats.json, scenario_state.json), not HELM's code. Files that are
not there, as in a copied suite of tables alone, are no error: there is then nothing to compare by instance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from harness.report.inputs.data import Result
from harness.report.inputs.json_file import Document
from harness.suite.score import BITS_PER_BYTE, values_by_instance

MOST_PROMPT = 6_000
"""Characters of a prompt that a report keeps: its end, where the question stands."""


@dataclass(frozen=True)
class AskedInstance:
    """One request of one instance, as one policy answered it."""

    instance: str
    trial: int
    question: str
    """The instance's input, without examples."""

    prompt: str
    """What the model was given, its beginning cut off where it is very long."""

    correct: tuple[str, ...]
    """References that count as right."""

    answer: str
    seconds: float | None
    """Wall time of the passes that it took part in; None where it was not recorded."""


def instance_values(result: Result) -> dict[str, float]:
    """The main metric by instance, the mean over train trials; empty where nothing was stored.

    Raises:
        UsageError: if the file is damaged.
    """
    path = result.folder / "per_instance_stats.json" if result.folder else None
    if path is None or not path.is_file():
        return {}
    stored = Document.read(path)
    try:
        if result.metric == BITS_PER_BYTE:
            logprobs = values_by_instance(stored.content, "logprob")
            sizes = values_by_instance(stored.content, "num_bytes")
            return {
                key: -math.fsum(logprobs[key]) / math.fsum(sizes[key]) / math.log(2)
                for key in logprobs
                if math.fsum(sizes.get(key, ()))
            }
        return {key: fmean(v) for key, v in values_by_instance(stored.content, result.metric).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise stored.damage("", f"is not what HELM writes ({type(error).__name__})") from error


def asked(result: Result) -> dict[tuple[str, int], AskedInstance]:
    """What was asked and answered, by instance and train trial; empty where nothing was stored.

    Of an instance whose references are asked one by one, the answer is the reference of highest
    log-probability.

    Raises:
        UsageError: if the file is damaged.
    """
    path = result.folder / "scenario_state.json" if result.folder else None
    if path is None or not path.is_file():
        return {}
    stored = Document.read(path)
    found: dict[tuple[str, int], AskedInstance] = {}
    best: dict[tuple[str, int], float] = {}
    try:
        for state in stored.content["request_states"]:
            instance = state["instance"]
            if instance.get("perturbation"):
                continue
            key = (str(instance["id"]), int(state.get("train_trial_index", 0)))
            completion = (state["result"]["completions"] or [{"text": "", "logprob": 0.0}])[0]
            if state.get("reference_index") is not None:
                if completion["logprob"] <= best.get(key, -math.inf):
                    continue
                best[key] = completion["logprob"]
            elif key in found:
                continue
            found[key] = _asked(key, state, completion)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise stored.damage("request_states", f"is not what HELM writes ({type(error).__name__})") from error
    return found


def _asked(key: tuple[str, int], state: Mapping[str, Any], completion: Mapping[str, Any]) -> AskedInstance:
    instance, result = state["instance"], state["result"]
    references = instance["references"]
    index = state.get("reference_index")
    answer = str(completion["text"]) if index is None else str(references[index]["output"]["text"])
    mapping = state.get("output_mapping") or {}
    if answer.strip() in mapping:
        answer = f"{answer.strip()}: {mapping[answer.strip()]}"
    prompt = str(state["request"]["prompt"])
    seconds = result.get("batch_request_time")
    return AskedInstance(
        instance=key[0],
        trial=key[1],
        question=str(instance["input"]["text"])[-MOST_PROMPT:],
        prompt=prompt if len(prompt) <= MOST_PROMPT else "…" + prompt[-MOST_PROMPT:],
        correct=tuple(str(r["output"]["text"]) for r in references if "correct" in r.get("tags", ())),
        answer=answer,
        seconds=None if seconds is None else float(seconds),
    )
