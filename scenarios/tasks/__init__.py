"""Generators of examples, used by evaluation and by the demo model's training alike.

A task is a pure function ``generate(rng, difficulty) -> Example`` with the `PromptLayout` of its prompts.
Nothing here imports HELM, torch or a tokenizer.
"""

from __future__ import annotations

from scenarios.tasks.example import Example, PromptLayout, Task, examples, is_held_out
from scenarios.tasks.extraction import FORM_PROCESSING, INFORMATION_EXTRACTION
from scenarios.tasks.reasoning import DYCK_LANGUAGE, PATTERN_MATCH, VARIABLE_SUBSTITUTION
from scenarios.tasks.recall import KEY_VALUE_RECALL
from scenarios.tasks.wrangling import DATA_IMPUTATION, ERROR_DETECTION, PRODUCT_MATCHING, PRODUCT_RANKING

OWN_TASKS = {
    task.name: task
    for task in (
        INFORMATION_EXTRACTION,
        FORM_PROCESSING,
        DATA_IMPUTATION,
        ERROR_DETECTION,
        PRODUCT_MATCHING,
        KEY_VALUE_RECALL,
    )
}
"""Tasks that the demo model learns and that are evaluated on our own examples, by name."""

HELM_TASKS = {task.name: task for task in (PATTERN_MATCH, VARIABLE_SUBSTITUTION, DYCK_LANGUAGE)}
"""Tasks that are evaluated on the instances of HELM's own scenarios, by name."""

__all__ = [
    "HELM_TASKS",
    "OWN_TASKS",
    "PRODUCT_RANKING",
    "Example",
    "PromptLayout",
    "Task",
    "examples",
    "is_held_out",
]
