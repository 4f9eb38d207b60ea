"""Product matching: do two table rows describe the same product? (entity matching)

Run entries, with ``method=``, and own data: `scenarios.task_scenario`.
"""

from scenarios.task_scenario import METHODS, TaskScenario
from scenarios.tasks import PRODUCT_MATCHING


class ProductMatchingScenario(TaskScenario):
    """Pairs of products that are equal or differ in one field."""

    name = "product_matching"
    description = "Say whether two table rows describe the same product (entity matching)."
    tags = ["entity_matching", "data_wrangling", "back_office"]
    task = PRODUCT_MATCHING
    methods = METHODS
