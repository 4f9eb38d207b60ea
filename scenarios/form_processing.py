"""Form processing: turn a request in free words into a record.

Run entries and own data: `scenarios.task_scenario`.
"""

from scenarios.task_scenario import TaskScenario
from scenarios.tasks import FORM_PROCESSING


class FormProcessingScenario(TaskScenario):
    """Requests in free words; the answer is ``name | date | item | amount``."""

    name = "form_processing"
    description = "Fill in the fields of a form, in a fixed order, from a request in free words."
    tags = ["form_processing", "back_office"]
    task = FORM_PROCESSING
