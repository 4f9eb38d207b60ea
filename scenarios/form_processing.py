"""Form processing: turn a request in free words into a record.

Run entries: ``form_processing``, ``form_processing:seed=7``.
Own data: ``form_processing:data=rows.jsonl`` with the columns ``input`` and ``output``; see
`scenarios.task_scenario.Source` for all arguments.
"""

from __future__ import annotations

from typing import Any

from helm.benchmark.run_spec import RunSpec, run_spec_function

from scenarios.task_scenario import TaskScenario, task_run_spec
from scenarios.tasks import FORM_PROCESSING


class FormProcessingScenario(TaskScenario):
    """Requests in free words; the answer is ``name | date | item | amount``."""

    name = "form_processing"
    title = "Form processing"
    description = "Fill in the fields of a form, in a fixed order, from a request in free words."
    tags = ["form_processing", "back_office"]
    task = FORM_PROCESSING


@run_spec_function("form_processing")
def get_form_processing_spec(**arguments: Any) -> RunSpec:
    """Run entry ``form_processing``; raises UsageError for an unknown argument."""
    return task_run_spec(FormProcessingScenario, arguments)
