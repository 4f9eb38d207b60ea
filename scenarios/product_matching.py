"""Product matching: do two table rows describe the same product? (entity matching)

Run entries: ``product_matching``, ``product_matching:method=multiple_choice_joint``.
``method`` is any of generation, multiple_choice_joint, multiple_choice_separate_original and
multiple_choice_separate_calibrated.
Own data: ``product_matching:data=rows.jsonl`` with the columns ``input`` and ``output`` (and
``choices``); see `scenarios.task_scenario.Source` for all arguments.
"""

from __future__ import annotations

from typing import Any

from helm.benchmark.run_spec import RunSpec, run_spec_function

from scenarios.task_scenario import TaskScenario, task_run_spec
from scenarios.tasks import PRODUCT_MATCHING


class ProductMatchingScenario(TaskScenario):
    """Pairs of products that are equal or differ in one field."""

    name = "product_matching"
    title = "Product matching"
    description = "Say whether two table rows describe the same product (entity matching)."
    tags = ["entity_matching", "data_wrangling", "back_office"]
    task = PRODUCT_MATCHING


@run_spec_function("product_matching")
def get_product_matching_spec(method: str = "generation", **arguments: Any) -> RunSpec:
    """Run entry ``product_matching``; raises UsageError for an unknown argument or method."""
    return task_run_spec(ProductMatchingScenario, arguments, method)
