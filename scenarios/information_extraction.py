"""Information extraction: read one field out of a short business notice.

Run entries: ``information_extraction``, ``information_extraction:seed=7``.
Own data: ``information_extraction:data=rows.jsonl`` with the columns ``input`` and ``output``; all arguments
are in `scenarios.task_scenario.Source`.
"""

from scenarios.task_scenario import TaskScenario
from scenarios.tasks import INFORMATION_EXTRACTION


class InformationExtractionScenario(TaskScenario):
    """Notices about orders; the answer is copied from the text."""

    name = "information_extraction"
    title = "Information extraction"
    description = "Find the value of a named field in a short business notice."
    tags = ["information_extraction", "back_office"]
    task = INFORMATION_EXTRACTION
