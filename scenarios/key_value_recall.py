"""Key-value recall: look up one of up to 18 keys in the prompt, the plainest probe of the KV cache.

Run entries: ``key_value_recall``, ``key_value_recall:seed=7``.
Own data: ``key_value_recall:data=rows.jsonl`` with the columns ``input`` and ``output``; see
`scenarios.task_scenario.Source` for all arguments.
"""

from __future__ import annotations

from typing import Any

from helm.benchmark.run_spec import RunSpec, run_spec_function

from scenarios.task_scenario import TaskScenario, task_run_spec
from scenarios.tasks import KEY_VALUE_RECALL


class KeyValueRecallScenario(TaskScenario):
    """Random lists: nothing can be guessed, so every loss is a loss of memory."""

    name = "key_value_recall"
    title = "Key-value recall"
    description = "Look up the value of a key in a list in the prompt."
    tags = ["recall", "kv_cache"]
    task = KEY_VALUE_RECALL


@run_spec_function("key_value_recall")
def get_key_value_recall_spec(**arguments: Any) -> RunSpec:
    """Run entry ``key_value_recall``; raises UsageError for an unknown argument."""
    return task_run_spec(KeyValueRecallScenario, arguments)
