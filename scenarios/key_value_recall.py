"""Key-value recall: look up one of up to 18 keys in the prompt, the plainest probe of the KV cache.

Run entries: ``key_value_recall``, ``key_value_recall:seed=7``.
Own data: ``key_value_recall:data=rows.jsonl`` with the columns ``input`` and ``output``; all arguments are in
`scenarios.task_scenario.Source`.
"""

from scenarios.task_scenario import TaskScenario
from scenarios.tasks import KEY_VALUE_RECALL


class KeyValueRecallScenario(TaskScenario):
    """Random lists: nothing can be guessed, so every wrong answer is a fault of the KV cache."""

    name = "key_value_recall"
    title = "Key-value recall"
    description = "Look up the value of a key in a list in the prompt."
    tags = ["recall", "kv_cache"]
    task = KEY_VALUE_RECALL
