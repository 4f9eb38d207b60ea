"""Language modelling over short office memos that the demo model has not seen.

Run entries: ``demo_text``, ``demo_text:seed=7,paragraphs=12`` (longer than a window of 512 tokens). Own data:
``demo_text:data=texts.jsonl,input_column=text``, one text per row.
"""

from __future__ import annotations

import random
from typing import Any

from helm.benchmark.adaptation.common_adapter_specs import get_language_modeling_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_language_modeling_metric_specs
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import TEST_SPLIT, Input, Instance, Scenario, ScenarioMetadata

from engine.errors import UsageError
from scenarios.records import read_rows, text_field
from scenarios.task_scenario import Source, make_run_spec, metadata
from scenarios.tasks.memos import memo_of_side

NUM_TEXTS = 200

UNUSED = ("output_column", "choices_column")
"""Arguments of `Source` that have no meaning here: a text has no answer."""


class DemoTextScenario(Scenario):
    """Texts without references, scored by HELM's language modelling metrics."""

    name = "demo_text"
    description = "Language modelling over made-up office memos."
    tags = ["language_modeling"]

    def __init__(self, paragraphs: int = 1, **arguments: Any) -> None:
        super().__init__()
        self.definition_path = "scenarios/demo_text.py"
        self.source = Source.parse(self.name, arguments, UNUSED)
        if not isinstance(paragraphs, int) or paragraphs < 1:
            raise UsageError(f"demo_text: paragraphs={paragraphs!r} is not a whole number of at least 1")
        self.paragraphs = paragraphs

    def get_instances(self, output_path: str) -> list[Instance]:
        """Evaluation instances only, as HELM's language modelling adapter demands."""
        return [Instance(input=Input(text=text), references=[], split=TEST_SPLIT) for text in self._texts()]

    def _texts(self) -> list[str]:
        source = self.source
        if source.data:
            rows = read_rows(source.data, source.split or TEST_SPLIT)
            return [text_field(row, source.input_column, "input_column") for row in rows]
        rng = random.Random(f"demo_text:{source.seed}")
        return [
            "\n".join(memo_of_side(rng, 9, held_out=True) for _ in range(self.paragraphs))
            for _ in range(NUM_TEXTS)
        ]

    def get_metadata(self) -> ScenarioMetadata:
        """What helm-summarize prints."""
        return metadata(self, ("language modeling", "memos"), "bits_per_byte")


@run_spec_function("demo_text")
def get_demo_text_spec(paragraphs: int = 1, **arguments: Any) -> RunSpec:
    """Run entry ``demo_text``; raises UsageError for an unknown argument."""
    source = Source.parse("demo_text", arguments, UNUSED).changed()
    chosen = source if paragraphs == 1 else source | {"paragraphs": paragraphs}
    metrics = get_language_modeling_metric_specs([])
    return make_run_spec(DemoTextScenario, chosen, chosen, get_language_modeling_adapter_spec(), metrics)
