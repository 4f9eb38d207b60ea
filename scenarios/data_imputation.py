"""Data imputation: fill in a table row's missing city, which its area code gives away.

Run entries: ``data_imputation``, ``data_imputation:method=multiple_choice_separate_original``; the methods
are `scenarios.task_scenario.METHODS`. Own data: ``data_imputation:data=rows.jsonl`` with the columns
``input`` and ``output`` (and ``choices``); all arguments are in `scenarios.task_scenario.Source`.
"""

from scenarios.task_scenario import METHODS, TaskScenario
from scenarios.tasks import DATA_IMPUTATION


class DataImputationScenario(TaskScenario):
    """Restaurants without their city; four cities to choose from for the methods with choices."""

    name = "data_imputation"
    title = "Data imputation"
    description = "Fill in the missing value of a table row."
    tags = ["data_imputation", "data_wrangling", "back_office"]
    task = DATA_IMPUTATION
    methods = METHODS
