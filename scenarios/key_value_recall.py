"""Key-value recall: look up one of up to 18 keys in the prompt, the plainest probe of the KV cache.

Run entries and own data: `scenarios.task_scenario`.
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
