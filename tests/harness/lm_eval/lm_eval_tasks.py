"""Tasks of lm-evaluation-harness for tests, with data of their own, so that no network is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

LONG = "Rules: if the apple is red, then the apple is sweet. " * 30
"""Longer than the tiny model's window of 256 tokens."""

CHOICES = [
    {
        "question": f"Question: Is {number} even or odd?",
        "choices": ["Even", "Odd", "Neither of them, I should say"],
        "gold": number % 2,
    }
    for number in range(9)
] + [{"question": LONG, "choices": ["red", "sweet"], "gold": 1}]

QUESTIONS = [
    {"question": f"Passage: water boils at {number}. Does it?\nAnswer:", "answer": "Yes"}
    for number in range(5)
] + [{"question": LONG, "answer": "sweet"}]

TEXTS = [{"text": text} for text in ("water boils", "Grüße aus Zürich, naïve café. 你好", LONG)]


def save_tasks(folder: Path, context: str = "Answer:", likely: str = " Yes") -> Path:
    """Save one task of every request type: my_choice, my_answers, my_texts, my_likely.

    Args:
        likely: a text that the model's greedy decoding gives after the context.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = {"doc_to_text": "{{question}}\nAnswer:", "fewshot_split": "test"}
    _save(folder, "my_choice", CHOICES, common | {
        "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
        "metric_list": _metrics("acc", "acc_norm"),
    })  # fmt: skip
    _save(folder, "my_answers", QUESTIONS, common | {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "e "], "max_gen_toks": 12, "do_sample": False},
        "metric_list": _metrics("exact_match"),
    })  # fmt: skip
    _save(folder, "my_texts", TEXTS, {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    })  # fmt: skip
    likelies = [{"target": likely}, {"target": " No"}, {"target": likely + likely}]
    _save(folder, "my_likely", likelies, {
        "output_type": "loglikelihood", "doc_to_text": context, "doc_to_target": "{{target}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            *_metrics("acc"),
        ],
    })  # fmt: skip
    return folder


def _metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def _save(folder: Path, name: str, rows: list[dict[str, Any]], task: dict[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(source | task, allow_unicode=True))
