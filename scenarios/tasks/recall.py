"""Key-value recall: the plainest probe of the KV cache.

The answer cannot be known in advance or guessed, so a wrong answer is a fault of the KV cache: compressing
the cache shows on this task first.
"""

from __future__ import annotations

import random

from scenarios.tasks.example import Example, PromptLayout, Task
from scenarios.tasks.words import ANIMALS, COLORS, FRUITS, KEYS

MAX_PAIRS = 18


def key_value_recall(rng: random.Random, difficulty: float = 1.0) -> Example:
    """A list of keys and values (at least four pairs, up to 18 at full difficulty) and one of the keys.

    The answer follows the key as in the list, which is the plainest form of in-context recall.
    """
    most = 4 + round((MAX_PAIRS - 4) * difficulty)
    keys = rng.sample(KEYS, rng.randint(max(4, most - 6), most))
    values = dict(zip(keys, rng.choices(COLORS + ANIMALS + FRUITS, k=len(keys)), strict=True))
    context = "; ".join(f"{key}: {value}" for key, value in values.items())
    asked = rng.sample(keys, 4)
    pairs = [(f"\nKey: {key}", values[key]) for key in asked]
    return Example(context, *pairs[0], more=tuple(pairs[1:]))


KEY_VALUE_RECALL = Task(
    "key_value_recall",
    PromptLayout(
        "Look up the value of the key.",
        input_prefix="List: ",
        input_suffix="",
        output_prefix=": ",
        shots=1,
        max_tokens=5,
    ),
    key_value_recall,
)
