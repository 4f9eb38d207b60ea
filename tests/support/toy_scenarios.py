"""HELM run specs over made-up instances, one per adaptation method: a plugin for tests of the harness."""

from __future__ import annotations

from dataclasses import replace

from helm.benchmark.adaptation.adapter_spec import (
    ADAPT_MULTIPLE_CHOICE_SEPARATE_CALIBRATED,
    ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL,
    AdapterSpec,
)
from helm.benchmark.adaptation.common_adapter_specs import (
    get_generation_adapter_spec,
    get_language_modeling_adapter_spec,
    get_multiple_choice_joint_adapter_spec,
    get_multiple_choice_separate_adapter_spec,
    get_ranking_binary_adapter_spec,
)
from helm.benchmark.metrics.common_metric_specs import (
    get_basic_metric_specs,
    get_basic_reference_metric_specs,
    get_exact_match_metric_specs,
    get_language_modeling_metric_specs,
)
from helm.benchmark.metrics.metric import MetricInterface, MetricResult, MetricSpec
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    CORRECT_TAG,
    TEST_SPLIT,
    TRAIN_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioSpec,
)

WORDS = ("apple", "water", "word", "Zürich", "café", "мир", "“quoted”", "你好")


class ToyScenario(Scenario):
    """The smallest input of each adaptation method: questions with three references, or texts without any.

    The line of an instance is repeated ``repeat`` times, so that tests can exceed a context window.
    """

    name = "toy"
    description = "Made up."
    tags: list[str] = []

    def __init__(self, texts: bool = False, repeat: int = 1, eval_instances: int = 4) -> None:
        super().__init__()
        self.texts, self.repeat, self.eval_instances = texts, repeat, eval_instances

    def get_instances(self, output_path: str) -> list[Instance]:
        """Four training instances (none of texts), then evaluation instances."""
        splits = [] if self.texts else [TRAIN_SPLIT] * 4
        splits += [TEST_SPLIT] * self.eval_instances
        return [self._instance(i, split) for i, split in enumerate(splits)]

    def _instance(self, i: int, split: str) -> Instance:
        line = f"{i}: the {WORDS[i % 8]} is {WORDS[(i * 3 + 1) % 8]}; "
        references = [
            Reference(Output(WORDS[(i + k) % 8]), tags=[CORRECT_TAG] if k == i % 3 else []) for k in range(3)
        ]
        return Instance(Input(line * self.repeat), [] if self.texts else references, split=split)


def _spec(name: str, adapter: AdapterSpec, metrics: list[MetricSpec], **scenario: object) -> RunSpec:
    scenario_spec = ScenarioSpec("tests.support.toy_scenarios.ToyScenario", scenario)
    return RunSpec(
        name, scenario_spec, adapter, metrics, groups=["synthetic_reasoning"]
    )  # HELM's schema has it


@run_spec_function("toy_generation")
def toy_generation(repeat: int = 1, eval_instances: int = 4) -> RunSpec:
    """Greedy generation with a stop string."""
    adapter = get_generation_adapter_spec(
        instructions="Name it.",
        output_noun="Answer",
        max_train_instances=2,
        max_tokens=8,
        stop_sequences=["e"],
    )
    metrics = get_exact_match_metric_specs()
    name = f"toy_generation:repeat={repeat},eval_instances={eval_instances}"
    return _spec(name, adapter, metrics, repeat=repeat, eval_instances=eval_instances)


@run_spec_function("toy_sampling")
def toy_sampling() -> RunSpec:
    """Three sampled completions of every prompt, in two train trials."""
    adapter = get_generation_adapter_spec(
        output_noun="Answer", max_train_instances=1, max_tokens=6, num_outputs=3, temperature=0.8
    )
    adapter = replace(adapter, num_train_trials=2)
    return _spec("toy_sampling", adapter, get_basic_metric_specs(["exact_match"]))


@run_spec_function("toy_joint")
def toy_joint() -> RunSpec:
    """Multiple choice by letter."""
    adapter = get_multiple_choice_joint_adapter_spec(
        instructions="Choose.",
        input_noun="Question",
        output_noun="Answer",
        max_train_instances=1,
        max_tokens=1,
    )
    return _spec("toy_joint", adapter, get_exact_match_metric_specs())


@run_spec_function("toy_separate")
def toy_separate() -> RunSpec:
    """Multiple choice by the references' probabilities."""
    adapter = get_multiple_choice_separate_adapter_spec(ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL)
    return _spec("toy_separate", adapter, get_basic_reference_metric_specs())


@run_spec_function("toy_calibrated")
def toy_calibrated() -> RunSpec:
    """Multiple choice by the references' probabilities above those without the question."""
    adapter = get_multiple_choice_separate_adapter_spec(ADAPT_MULTIPLE_CHOICE_SEPARATE_CALIBRATED)
    return _spec("toy_calibrated", adapter, get_basic_reference_metric_specs())


@run_spec_function("toy_language_modeling")
def toy_language_modeling() -> RunSpec:
    """Texts longer than the tiny models' window of 256 tokens."""
    adapter, metrics = get_language_modeling_adapter_spec(), get_language_modeling_metric_specs([])
    return _spec("toy_language_modeling", adapter, metrics, texts=True, repeat=40)


@run_spec_function("toy_ranking")
def toy_ranking() -> RunSpec:
    """Yes or no per reference."""
    adapter = get_ranking_binary_adapter_spec(max_train_instances=2)
    return _spec("toy_ranking", adapter, get_basic_reference_metric_specs())


@run_spec_function("toy_broken_metric")
def toy_broken_metric() -> RunSpec:
    """Its metric is in a module that does not exist."""
    metric = MetricSpec("tests.support.no_such_module.Metric")
    return _spec("toy_broken_metric", get_generation_adapter_spec(), [metric])


class FailingMetric(MetricInterface):
    """A metric that can be created but fails when it scores, so that tests see how a suite reports that."""

    def evaluate(self, *_: object) -> MetricResult:
        """Fail like a metric whose word list is missing."""
        raise LookupError("Resource punkt_tab not found.")


@run_spec_function("toy_failing_metric")
def toy_failing_metric() -> RunSpec:
    """Its metric fails once the answers are there."""
    metric = MetricSpec("tests.support.toy_scenarios.FailingMetric")
    return _spec("toy_failing_metric", get_generation_adapter_spec(), [metric])
