"""Data imputation: fill in a table row's missing city, which its area code gives away.

Run entries, with ``method=``, and own data: `scenarios.task_scenario`.
"""

from scenarios.task_scenario import METHODS, TaskScenario
from scenarios.tasks import DATA_IMPUTATION


class DataImputationScenario(TaskScenario):
    """Restaurants without their city; four cities to choose from for the methods with choices."""

    name = "data_imputation"
    description = "Fill in the missing value of a table row."
    tags = ["data_imputation", "data_wrangling", "back_office"]
    task = DATA_IMPUTATION
    methods = METHODS
