"""Data imputation: fill in a table row's missing city, which its area code gives away.

Run entries: ``data_imputation``, ``data_imputation:method=multiple_choice_separate_original``.
``method`` is any of generation, multiple_choice_joint, multiple_choice_separate_original and
multiple_choice_separate_calibrated.
Own data: ``data_imputation:data=rows.jsonl`` with the columns ``input`` and ``output`` (and
``choices``); see `scenarios.task_scenario.Source` for all arguments.
"""

from __future__ import annotations

from typing import Any

from helm.benchmark.run_spec import RunSpec, run_spec_function

from scenarios.task_scenario import TaskScenario, task_run_spec
from scenarios.tasks import DATA_IMPUTATION


class DataImputationScenario(TaskScenario):
    """Restaurants without their city; four cities to choose from where a method wants choices."""

    name = "data_imputation"
    title = "Data imputation"
    description = "Fill in the missing value of a table row."
    tags = ["data_imputation", "data_wrangling", "back_office"]
    task = DATA_IMPUTATION


@run_spec_function("data_imputation")
def get_data_imputation_spec(method: str = "generation", **arguments: Any) -> RunSpec:
    """Run entry ``data_imputation``; raises UsageError for an unknown argument or method."""
    return task_run_spec(DataImputationScenario, arguments, method)
