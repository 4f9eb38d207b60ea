"""Information extraction: read one field out of a short business notice.

Run entries: ``information_extraction``, ``information_extraction:seed=7``.
Own data: ``information_extraction:data=rows.jsonl`` with the columns ``input`` and ``output``; see
`scenarios.task_scenario.Source` for all arguments.
"""

from __future__ import annotations

from typing import Any

from helm.benchmark.run_spec import RunSpec, run_spec_function

from scenarios.task_scenario import TaskScenario, task_run_spec
from scenarios.tasks import INFORMATION_EXTRACTION


class InformationExtractionScenario(TaskScenario):
    """Notices about orders; the answer is copied from the text."""

    name = "information_extraction"
    title = "Information extraction"
    description = "Find the value of a named field in a short business notice."
    tags = ["information_extraction", "back_office"]
    task = INFORMATION_EXTRACTION


@run_spec_function("information_extraction")
def get_information_extraction_spec(**arguments: Any) -> RunSpec:
    """Run entry ``information_extraction``; raises UsageError for an unknown argument."""
    return task_run_spec(InformationExtractionScenario, arguments)
