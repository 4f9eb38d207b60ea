"""Error detection: is the named field of a table row misspelt?

Run entries: ``error_detection``, ``error_detection:method=multiple_choice_separate_calibrated``.
``method`` is any of generation, multiple_choice_joint, multiple_choice_separate_original and
multiple_choice_separate_calibrated.
Own data: ``error_detection:data=rows.jsonl`` with the columns ``input`` and ``output`` (and
``choices``); see `scenarios.task_scenario.Source` for all arguments.
"""

from __future__ import annotations

from typing import Any

from helm.benchmark.run_spec import RunSpec, run_spec_function

from scenarios.task_scenario import TaskScenario, task_run_spec
from scenarios.tasks import ERROR_DETECTION


class ErrorDetectionScenario(TaskScenario):
    """Restaurants with a letter replaced by ``x`` in the asked field, in another one, or nowhere."""

    name = "error_detection"
    title = "Error detection"
    description = "Say whether the named field of a table row has a spelling error."
    tags = ["error_detection", "data_wrangling", "back_office"]
    task = ERROR_DETECTION


@run_spec_function("error_detection")
def get_error_detection_spec(method: str = "generation", **arguments: Any) -> RunSpec:
    """Run entry ``error_detection``; raises UsageError for an unknown argument or method."""
    return task_run_spec(ErrorDetectionScenario, arguments, method)
