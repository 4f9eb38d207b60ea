"""Training documents: few-shot prompts with their answers, packed into rows of equal length.

A document is a list of (text, weight) pieces; the weight is that of its tokens in the loss. Every batch
depends only on its step number, so that a resumed training sees the same data. It knows nothing of the model.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from scenarios.demo.tokenizer import SPECIAL_TOKENS
from scenarios.tasks import HELM_TASKS, OWN_TASKS, Example, Task, is_held_out
from scenarios.tasks.memos import memo

ANSWER, PROMPT, TEXT, BRACKETS = 1.0, 0.05, 0.5, 0.3
"""Loss weights of answers, of the prompt around them, of running text, and of dyck prompts."""

MIX = {
    "information_extraction": 1.0,
    "form_processing": 1.0,
    "data_imputation": 0.4,
    "error_detection": 0.6,
    "product_matching": 0.2,
    "key_value_recall": 2.0,
    "pattern_match": 2.0,
    "variable_substitution": 0.6,
    "dyck_language": 0.1,
    "memo": 0.5,
}
"""Relative frequency of each kind of document."""

Piece = tuple[str, float]


@dataclass(frozen=True)
class Batch:
    """One optimiser step's rows, each [rows, length]."""

    input_ids: torch.Tensor
    weights: torch.Tensor
    """Loss weight of each token as a target; zero for padding."""


class DocumentSource:
    """Draws documents of all tasks, without evaluation instances."""

    def __init__(self, tokenizer: Tokenizer, excluded: Collection[str]) -> None:
        """``excluded`` are the inputs of HELM's own instances; the other tasks are split by a hash."""
        self.tokenizer = tokenizer
        self.excluded = frozenset(excluded)
        self.padding, self.begin = SPECIAL_TOKENS.index("<pad>"), SPECIAL_TOKENS.index("</s>")

    def example(self, task: Task, rng: random.Random, difficulty: float) -> Example:
        """One example of the training side."""
        while True:
            example = task.generate(rng, difficulty)
            seen_by_evaluation = example.input in self.excluded if task.name in HELM_TASKS else False
            if not seen_by_evaluation and not is_held_out(example.context):
                return example

    def document(self, rng: random.Random, difficulty: float, length: int) -> tuple[list[int], list[float]]:
        """Token ids and loss weights of one document of at most ``length`` tokens, ``</s>`` first."""
        kind = rng.choices(list(MIX), list(MIX.values()))[0]
        if kind == "memo":
            while is_held_out(text := memo(rng, rng.randint(3, 9))):
                pass
            return self._encode([(text, TEXT)], length)
        task = (OWN_TASKS | HELM_TASKS)[kind]
        pieces = [(task.layout.instructions + "\n", PROMPT)]
        ids, weights = self._encode(pieces, length)
        for _ in range(rng.randint(1, task.layout.shots + 1)):
            block = self._encode(_block(task, self.example(task, rng, difficulty)), 10 * length)
            if len(ids) + len(block[0]) - 1 > length:
                break
            ids += block[0][1:]
            weights += block[1][1:]
        return ids, weights

    def batch(self, step: int, seed: int, tokens: int, length: int, difficulty: float) -> Batch:
        """The batch of one step: ``tokens // length`` rows, packed first-fit."""
        rng = random.Random(f"{seed}:{step}")
        rows = [([], []) for _ in range(tokens // length)]  # type: list[tuple[list[int], list[float]]]
        misses = 0
        while misses < 4:
            ids, weights = self.document(rng, difficulty, length)
            for row_ids, row_weights in rows:
                if len(row_ids) + len(ids) <= length:
                    row_ids += ids
                    row_weights += weights
                    break
            else:
                misses += 1
        for row_ids, row_weights in rows:
            row_weights += [0.0] * (length - len(row_ids))
            row_ids += [self.padding] * (length - len(row_ids))
        return Batch(torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows]))

    def _encode(self, pieces: list[Piece], length: int) -> tuple[list[int], list[float]]:
        ids, weights = [self.begin], [0.0]
        encoded = self.tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False)
        for (_, weight), found in zip(pieces, encoded, strict=True):
            ids += found.ids
            weights += [weight] * len(found.ids)
        return ids[:length], weights[:length]


def _block(task: Task, example: Example) -> list[Piece]:
    """The pieces of one worked example, the newline before it included."""
    layout = task.layout
    prompt_weight = BRACKETS if task.name == "dyck_language" else PROMPT
    # A layout without an output suffix ends its answers with the newline that joins the blocks.
    end = "" if layout.output_suffix else "\n"
    pieces = [] if layout.output_suffix == "" else [("\n", PROMPT)]
    pieces.append((layout.question_block(example.input), prompt_weight))
    pieces.append((layout.answer(example.output) + end, ANSWER))
    for question, output in example.more:
        pieces.append(
            (question.lstrip("\n") + layout.input_suffix + layout.output_prefix.rstrip(" "), PROMPT)
        )
        pieces.append((layout.answer(output), ANSWER))
    return pieces
