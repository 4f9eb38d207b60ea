"""Information extraction: read one field out of a short business notice.

Run entries and own data: `scenarios.task_scenario`.
"""

from scenarios.task_scenario import TaskScenario
from scenarios.tasks import INFORMATION_EXTRACTION


class InformationExtractionScenario(TaskScenario):
    """Notices about orders; the answer is copied from the text."""

    name = "information_extraction"
    description = "Find the value of a named field in a short business notice."
    tags = ["information_extraction", "back_office"]
    task = INFORMATION_EXTRACTION
