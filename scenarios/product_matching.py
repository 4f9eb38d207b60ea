"""Product matching: do two table rows describe the same product? (entity matching)

Run entries: ``product_matching``, ``product_matching:method=multiple_choice_joint``; the methods are
`scenarios.task_scenario.METHODS`. Own data: ``product_matching:data=rows.jsonl`` with the columns ``input``
and ``output`` (and ``choices``); all arguments are in `scenarios.task_scenario.Source`.
"""

from scenarios.task_scenario import METHODS, TaskScenario
from scenarios.tasks import PRODUCT_MATCHING


class ProductMatchingScenario(TaskScenario):
    """Pairs of products that are equal or differ in one field."""

    name = "product_matching"
    title = "Product matching"
    description = "Say whether two table rows describe the same product (entity matching)."
    tags = ["entity_matching", "data_wrangling", "back_office"]
    task = PRODUCT_MATCHING
    methods = METHODS
