"""Figures that others have published, as rows that are marked so and enter no ratio.

They were measured on other machines, so they show orders of magnitude only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.comparison.rows import COLUMNS

SOURCE = "FlexGen paper (arXiv 2303.06865), table 2"
MACHINE = "published: NVIDIA T4 16 GB, 208 GB RAM, 1.5 TB SSD"
MODELS = ("facebook/opt-6.7b", "facebook/opt-30b", "facebook/opt-175b")
PROMPT, GENERATED = 512, 32

TABLE: Sequence[tuple[str, str, int, tuple[tuple[float, int], ...]]] = (
    ("accelerate", "paper", 16, ((25.12, 2), (0.62, 8), (0.01, 2))),
    ("deepspeed", "paper", 16, ((9.28, 16), (0.60, 4), (0.01, 1))),
    ("petals", "paper", 16, ((8.25, 2), (2.84, 2), (0.08, 2))),
    ("flexgen", "paper", 16, ((25.26, 2), (7.32, 144), (0.69, 256))),
    ("flexgen", "paper-4bit", 4, ((29.12, 72), (8.38, 512), (1.12, 144))),
)
"""System, configuration, bits, and by model generated token/s and batch size."""


def rows(systems: Sequence[str]) -> list[dict[str, Any]]:
    """The published rows of these systems."""
    found = []
    for system, configuration, bits, figures in TABLE:
        if system not in systems:
            continue
        for model, (rate, batch) in zip(MODELS, figures, strict=True):
            found.append(dict.fromkeys(COLUMNS) | {
                "system": system, "configuration": configuration, "bits": bits, "model": model,
                "setting": MACHINE, "workload": f"random prompts of {PROMPT}, {GENERATED} generated",
                "prompt_len": PROMPT, "gen_len": GENERATED, "batch": batch, "repeat": 0,
                "generated_tokens_per_s": rate, "status": "published", "reason": SOURCE, "kind": "published",
                "cap_enforced": "published", "command": "", "versions": "{}", "settings": "{}",
            })  # fmt: skip
    return found
