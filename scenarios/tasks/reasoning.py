"""Training examples that resemble HELM's own synthetic scenarios.

Evaluation uses HELM's instances; these functions draw new ones from the same distributions
(``synthetic_reasoning_scenario.py`` and ``dyck_language_scenario.py`` of crfm-helm), in HELM's layouts.
"""

from __future__ import annotations

import random

from scenarios.tasks.example import Example, PromptLayout, Task
from scenarios.tasks.words import ANIMALS, FRUITS

RULE_SYMBOLS = ["X", "Y", "Z"]
MATH_SYMBOLS = ["+", "-", "*", "="]
BRACKETS = {"(": ")", "[": "]", "{": "}"}


def _shuffled(rng: random.Random, *symbols: str) -> str:
    return " ".join(rng.sample(symbols, len(symbols)))


def _substitutions(rng: random.Random, symbols: list[str]) -> dict[str, str]:
    return {s: " ".join(rng.choices(ANIMALS + FRUITS, k=rng.randint(1, 2))) for s in symbols}


def _pattern(rng: random.Random) -> tuple[list[str], list[str]]:
    """Rule symbols (with repeats) and mathematical symbols, two or three of each."""
    return rng.choices(RULE_SYMBOLS, k=rng.randint(2, 3)), rng.choices(MATH_SYMBOLS, k=rng.randint(2, 3))


def _apply(pattern: str, substitutions: dict[str, str]) -> str:
    return " ".join(substitutions.get(symbol, symbol) for symbol in pattern.split())


def pattern_match(rng: random.Random, difficulty: float = 1.0) -> Example:
    """Four patterns and a result: which pattern produced it? Fewer patterns at low difficulty."""
    rules, maths = _pattern(rng)
    distinct = sorted(set(rules))
    pattern = _shuffled(rng, *rules, *maths)
    wrong = 3 if rng.random() < difficulty else rng.randint(1, 2)
    # HELM draws the wrong patterns from the distinct rule symbols only; so do we.
    patterns = [_shuffled(rng, *distinct, *maths) for _ in range(wrong)] + [pattern]
    rng.shuffle(patterns)
    result = _apply(pattern, _substitutions(rng, distinct))
    return Example(f"Rules: {' | '.join(patterns)} | Result: {result}", "", pattern)


def variable_substitution(rng: random.Random, difficulty: float = 1.0) -> Example:
    """A pattern and what its variables stand for: write the result."""
    rules, maths = _pattern(rng)
    pattern = _shuffled(rng, *rules, *maths)
    substitutions = _substitutions(rng, sorted(set(rules)))
    written = " , ".join(f'{symbol} by " {text} "' for symbol, text in substitutions.items())
    return Example(f"Rules: {pattern} | Substitutions: {written}", "", _apply(pattern, substitutions))


def dyck_language(rng: random.Random, difficulty: float = 1.0) -> Example:
    """An unfinished bracket sequence: close what is open (one to three brackets)."""
    wanted = rng.randint(1, 3)
    length = rng.randint(4, 6 + round(90 * difficulty))
    sequence: list[str] = []
    stack: list[str] = []
    while len(sequence) < length or len(stack) != wanted:
        too_deep = len(sequence) >= length and len(stack) > wanted
        if not stack or rng.random() < (0.35 if too_deep else 0.52):
            bracket = rng.choice(list(BRACKETS))
            sequence.append(bracket)
            stack.append(BRACKETS[bracket])
        else:
            sequence.append(stack.pop())
    return Example(" ".join(sequence), "", " " + " ".join(reversed(stack)))


_SYNTHETIC = PromptLayout(
    "Please solve the following problem.", output_prefix="Target: ", shots=5, max_tokens=50
)

PATTERN_MATCH = Task("pattern_match", _SYNTHETIC, pattern_match)
VARIABLE_SUBSTITUTION = Task("variable_substitution", _SYNTHETIC, variable_substitution)
DYCK_LANGUAGE = Task(
    "dyck_language",
    PromptLayout(
        "Please complete the rest of the following Dyck sequences, "
        "making sure that the parentheses are closed properly.",
        input_prefix="Input: ", input_suffix="", output_prefix="", output_suffix="", shots=3, max_tokens=5,
    ),
    dyck_language,
)  # fmt: skip
