"""Error detection: is the named field of a table row misspelt?

Run entries, with ``method=``, and own data: `scenarios.task_scenario`.
"""

from scenarios.task_scenario import METHODS, TaskScenario
from scenarios.tasks import ERROR_DETECTION


class ErrorDetectionScenario(TaskScenario):
    """Restaurants with a letter replaced by ``x`` in the named field, in another one, or in none."""

    name = "error_detection"
    description = "Say whether the named field of a table row has a spelling error."
    tags = ["error_detection", "data_wrangling", "back_office"]
    task = ERROR_DETECTION
    methods = METHODS
