"""Measure the demo model with plain transformers: ``python -m scenarios.demo.evaluate``.

It computes exact match of greedy answers on held-out instances and perplexity of held-out memos, and writes
both into the model card. It does not use the engine, so that the engine's results can be compared with its
own.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from scenarios.demo.card import write_card
from scenarios.demo.helm_instances import helm_examples
from scenarios.tasks import HELM_TASKS, OWN_TASKS, Task, examples
from scenarios.tasks.memos import memo_of_side

MODEL = Path(__file__).parent / "model"
EVALUATION_SEED = 0


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (fp32, evaluation mode) and tokenizer of a transformers folder."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(folder)


def evaluation_set(task: Task, count: int) -> list[tuple[str, str]]:
    """(prompt, answer) pairs: held-out instances, each with its own random shots from the training side."""
    if task.name in HELM_TASKS:
        shots, held_out = helm_examples(task.name)
        held_out = held_out[-count:]  # HELM's "test" split comes last
    else:
        shots = list(itertools.islice(examples(task, EVALUATION_SEED, held_out=False), 50))
        held_out = list(itertools.islice(examples(task, EVALUATION_SEED, held_out=True), count))
    rng = random.Random(EVALUATION_SEED)
    layout = task.layout
    return [(layout.prompt(rng.sample(shots, layout.shots), one), one.output.strip()) for one in held_out]


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_tokens: int,
    batch: int = 50,
) -> list[str]:
    """Greedy answers, cut at the first newline and stripped, in the order of the prompts."""
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        encoded = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True)
        generated = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=newline,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, row in zip(chosen, generated[:, encoded["input_ids"].shape[1] :], strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True).split("\n")[0].strip()
    return texts


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, count: int
) -> tuple[float, int]:
    """Exact match on a task, and the number of instances."""
    pairs = evaluation_set(task, count)
    given = answers(model, tokenizer, [prompt for prompt, _ in pairs], task.layout.max_tokens)
    return sum(a == b for a, (_, b) in zip(given, pairs, strict=True)) / len(pairs), len(pairs)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> float:
    """Perplexity per token of held-out memos of nine sentences."""
    rng = random.Random(EVALUATION_SEED)
    loss, tokens = 0.0, 0
    for _ in range(count):
        text = memo_of_side(rng, 9, held_out=True)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        loss += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
        count -= 1
    return math.exp(loss / tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m scenarios.demo.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="transformers folder")
    parser.add_argument("--instances", type=int, default=200, help="per task")
    parser.add_argument("--tasks", nargs="*", choices=[*OWN_TASKS, *HELM_TASKS], help="default: all")
    parser.add_argument(
        "--write-card", action="store_true", help="write README.md and accuracy.json into --model"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, tokenizer = load(options.model)
    figures: dict[str, object] = {}
    for name, task in (OWN_TASKS | HELM_TASKS).items():
        if options.tasks and name not in options.tasks:
            continue
        exact, count = accuracy(model, tokenizer, task, options.instances)
        figures[name] = {"exact_match": round(exact, 3), "instances": count}
        print(f"{name:28s} {exact:.3f}  ({count} instances)", flush=True)
    figures["memo_perplexity"] = round(perplexity(model, tokenizer, 100), 3)
    print(f"{'memo perplexity':28s} {figures['memo_perplexity']}")
    if options.write_card:
        digest = hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest()
        (options.model / "accuracy.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        write_card(options.model, figures, digest)


if __name__ == "__main__":
    main()
