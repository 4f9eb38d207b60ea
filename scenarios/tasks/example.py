"""What a task consists of: examples, their prompt layout, and the split that keeps evaluation data unseen.

It handles text only, with the standard library. The same objects make the evaluation instances of `scenarios`
and the training documents of `scenarios.demo`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

HELD_OUT_SHARE = 10
"""One context in this many is held out for evaluation and never trained on."""


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    The prompt shows ``context + question``; ``question`` begins with its own separator (" " or a newline) and
    may be empty. The split depends on ``context`` only, so that no question about an evaluation context is
    ever trained on.
    """

    context: str
    question: str
    output: str

    choices: tuple[str, ...] = ()
    """All answers to choose from, including the right one; empty if there is no multiple-choice form."""

    more: tuple[tuple[str, str], ...] = ()
    """Further (question, output) pairs on the same context; only training uses them."""

    @property
    def input(self) -> str:
        """The text before the answer."""
        return self.context + self.question


@dataclass(frozen=True)
class PromptLayout:
    """How examples become a few-shot prompt: the fields of HELM's generation layout.

    ``instructions``, then blocks ``prefix input suffix output_prefix output output_suffix`` joined by
    single newlines; the last block ends before its answer (HELM's ``adaptation/prompt.py``).
    """

    instructions: str
    input_prefix: str = ""
    input_suffix: str = "\n"
    output_prefix: str = "Answer: "
    output_suffix: str = "\n"
    shots: int = 3
    max_tokens: int = 20

    def block(self, example: Example) -> str:
        """One worked example."""
        return self.question_block(example.input) + self.answer(example.output)

    def question_block(self, text: str) -> str:
        """The block up to the answer, without trailing spaces, which is how a prompt ends."""
        return (self.input_prefix + text + self.input_suffix + self.output_prefix).rstrip(" ")

    def answer(self, output: str) -> str:
        """What follows `question_block` in a worked example."""
        trimmed = len(self.output_prefix) - len(self.output_prefix.rstrip(" "))
        return " " * trimmed + output + self.output_suffix

    def prompt(self, shots: Sequence[Example], example: Example) -> str:
        """The few-shot prompt that asks for ``example.output``."""
        blocks = [self.instructions + "\n"] if self.instructions else []
        return "\n".join([*blocks, *map(self.block, shots), self.question_block(example.input)])


@dataclass(frozen=True)
class Task:
    """A generator of examples and the layout of their prompts."""

    name: str
    layout: PromptLayout
    generate: Callable[[random.Random, float], Example]
    """``generate(rng, difficulty)``; difficulty is between 0 and 1, and always 1 in evaluation."""


def is_held_out(context: str) -> bool:
    """Whether a context belongs to evaluation: its SHA-256 modulo ten is zero.

    Training uses only contexts for which this is false, so the two cannot overlap, whatever the seeds.
    """
    return int.from_bytes(hashlib.sha256(context.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def examples(task: Task, seed: int, *, held_out: bool, difficulty: float = 1.0) -> Iterator[Example]:
    """Distinct examples of one side of the split, the same for the same seed.

    It ends when a thousand draws in a row give no new context.
    """
    rng = random.Random(f"{task.name}:{seed}:{held_out}")
    seen: set[str] = set()
    misses = 0
    while misses < 1000:
        example = task.generate(rng, difficulty)
        if is_held_out(example.context) != held_out or example.context in seen:
            misses += 1
            continue
        misses = 0
        seen.add(example.context)
        yield example
