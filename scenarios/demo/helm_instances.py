"""HELM's own synthetic instances as plain examples, for the filter of the training data and for evaluation.

Only this file of the demo imports HELM, and only inside its functions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from scenarios.tasks import HELM_TASKS, Example


def helm_examples(name: str) -> tuple[list[Example], list[Example]]:
    """(shots, evaluation instances) of one of `scenarios.tasks.HELM_TASKS`, as HELM generates them."""
    import numpy
    from helm.benchmark.scenarios.dyck_language_scenario import DyckLanguageScenario
    from helm.benchmark.scenarios.synthetic_reasoning_scenario import SyntheticReasoningScenario

    state, numpy_state = random.getstate(), numpy.random.get_state()
    if name == "dyck_language":
        instances = DyckLanguageScenario(num_parenthesis_pairs=3).get_instances("")
    else:
        instances = SyntheticReasoningScenario(mode=name).get_instances("")
    random.setstate(state)
    numpy.random.set_state(numpy_state)
    shots: list[Example] = []
    evaluation: list[Example] = []
    for instance in instances:
        example = Example(instance.input.text, "", instance.references[0].output.text)
        (shots if instance.split == "train" else evaluation).append(example)
    return shots, evaluation


def helm_inputs(names: Iterable[str] = tuple(HELM_TASKS)) -> set[str]:
    """The input texts of all HELM instances on which the demo model is evaluated or which it is shown."""
    return {example.input for name in names for part in helm_examples(name) for example in part}
