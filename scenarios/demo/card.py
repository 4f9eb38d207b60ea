"""Writes the demo model's card from measured figures, so that card and checkpoint always agree."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from scenarios.demo.train import Recipe

NEAR_CHANCE = {
    "product_matching": "0.50 by always giving one answer",
    "variable_substitution": "nothing by guessing",
    "dyck_language": "0.12 by always giving the commonest answer",
}
"""What guessing achieves on the tasks that this model did not learn well."""

_SOURCES = {
    "pattern_match": "HELM `synthetic_reasoning:mode=pattern_match`, test split",
    "variable_substitution": "HELM `synthetic_reasoning:mode=variable_substitution`, test split",
    "dyck_language": "HELM `dyck_language:num_parenthesis_pairs=3`, test split",
}

_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# Tierbench demo model

A one-million-parameter OPT ({parameters:,} parameters: 4 layers, hidden size 128, 4 heads of 32, window
512, vocabulary 1536), trained from scratch so that the demo's accuracies are real and compression has a
visible price. It knows a few made-up office tasks and nothing else.

`model.safetensors` (fp16, {size:,} bytes), SHA-256:

    {digest}

## Accuracy on held-out instances

Exact match of greedy few-shot answers, measured with plain transformers in fp32 by
`python -m scenarios.demo.evaluate --write-card`. The standard error of a figure is at most {error:.3f}.

| task | exact match | instances | evaluated on |
|---|---|---|---|
{rows}

Perplexity per token of held-out memos: {perplexity}.

## Training

`python -m scenarios.demo.train`: {steps:,} steps of 2048 tokens ({tokens:.1f} M trained tokens,
{minutes:.0f} minutes of one CPU core), fp32, rows of 128, then 256, then 512 tokens, Muon on the matrices
and AdamW on the rest, one cosine, learned positions that start as sinusoids. The log is
`training_log.jsonl`, one line per 25 steps.{unfinished}

The data are drawn by the generators of `scenarios/tasks`: few-shot prompts of the tasks above in HELM's
layout, and short memos. All of it is made up; no outside text was used. Answers weigh 1 in the loss,
prompts 0.05, memos 0.5.

Evaluation instances are not in the training data. The generated tasks split by the SHA-256 of each
instance's context: one context in ten is kept for evaluation, the rest are for training. For HELM's own
tasks, training refuses every input that is among HELM's instances. The city that belongs to an area code
(data imputation) is learned by heart on purpose; the rows are held out.

## What it is not good for

- Anything but these tasks. It has seen about 230 words.
{near_chance}
- Judging compression of real models. What 4 bits cost a model of one million parameters says nothing
  about what they cost one of thirty billion.
- HELM scenarios that it was not trained on (`synthetic_reasoning_natural`, `induction`, multiple choice by
  letter): expect chance or less.
"""


def write_card(folder: Path, figures: Mapping[str, object], digest: str) -> None:
    """Write ``README.md`` beside the checkpoint; the length of the training is read from its log."""
    last = json.loads((folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    step, planned = last["step"], Recipe().steps
    stopped = f" Training was stopped at step {step:,} of a schedule laid out for {planned:,}."
    tasks = {name: figure for name, figure in figures.items() if isinstance(figure, Mapping)}
    rows, poor = [], []
    for name, figure in tasks.items():
        exact, source = figure["exact_match"], _SOURCES.get(name, f"`{name}`, held-out side of its split")
        rows.append(f"| {name} | {exact:.3f} | {figure['instances']} | {source} |")
        if name in NEAR_CHANCE:
            poor.append(f"- `{name}`, which it has hardly learned: {exact:.3f}, against {NEAR_CHANCE[name]}.")
    (folder / "README.md").write_text(
        _CARD.format(
            parameters=_parameters(folder / "model.safetensors"),
            size=(folder / "model.safetensors").stat().st_size,
            digest=digest,
            error=0.5 / min((figure["instances"] for figure in tasks.values()), default=1) ** 0.5,
            rows="\n".join(rows),
            perplexity=figures["memo_perplexity"],
            steps=step,
            tokens=last["tokens"] / 1e6,
            minutes=last["cpu_seconds"] / 60,
            near_chance="\n".join(poor),
            unfinished="" if step == planned else stopped,
        )
    )


def _parameters(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
