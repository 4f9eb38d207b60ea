"""From a task of `scenarios.tasks`, or the user's own rows in the same format, to a HELM run.

A scenario is a subclass of `TaskScenario` that sets class attributes and nothing else; see
`scenarios.information_extraction`. Its run entries are ``name``, ``name:seed=7``, ``name:data=rows.jsonl``
(own rows with the columns ``input`` and ``output``, and perhaps ``choices``) and so on, by the arguments in
`Source`. Where it has several methods, ``name:method=multiple_choice_joint`` chooses one of `METHODS`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from helm.benchmark.adaptation.adapter_spec import (
    ADAPT_GENERATION,
    ADAPT_MULTIPLE_CHOICE_JOINT,
    ADAPT_MULTIPLE_CHOICE_SEPARATE_CALIBRATED,
    ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL,
    AdapterSpec,
)
from helm.benchmark.adaptation.common_adapter_specs import get_multiple_choice_joint_adapter_spec
from helm.benchmark.metrics.common_metric_specs import get_basic_metric_specs, get_exact_match_metric_specs
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.presentation.taxonomy_info import TaxonomyInfo
from helm.benchmark.run_spec import RunSpec, run_spec_function
from helm.benchmark.scenarios.scenario import (
    ALL_SPLITS,
    CORRECT_TAG,
    TEST_SPLIT,
    TRAIN_SPLIT,
    Input,
    Instance,
    Output,
    Reference,
    Scenario,
    ScenarioMetadata,
    ScenarioSpec,
)

from engine.errors import UsageError, did_you_mean
from scenarios.records import DataError, LocatedRow, hub_splits, list_field, read_rows, text_field
from scenarios.tasks import PromptLayout, Task, examples

NUM_TRAIN = 50
NUM_TEST = 500
"""Generated instances per split; HELM's ``--max-eval-instances`` samples from the second."""

METHODS = (
    ADAPT_GENERATION, ADAPT_MULTIPLE_CHOICE_JOINT, ADAPT_MULTIPLE_CHOICE_SEPARATE_ORIGINAL,
    ADAPT_MULTIPLE_CHOICE_SEPARATE_CALIBRATED,
)  # fmt: skip
"""HELM's adaptation methods for a task whose examples have choices."""

GENERATION_METRICS = (
    "exact_match", "quasi_exact_match", "prefix_exact_match", "quasi_prefix_exact_match", "f1_score",
)  # fmt: skip
"""HELM's exact-match family, and word overlap."""


@dataclass(frozen=True)
class Source:
    """Where a scenario's instances come from: the run-entry arguments of every scenario here."""

    seed: int = 0
    """Seed of the generated instances; unused with ``data``."""

    data: str = ""
    """A ``.jsonl``, ``.csv`` or ``.parquet`` file, or a hub data set's name or folder; empty to generate."""

    split: str = ""
    """The split of a hub data set to evaluate on (default ``test``), or the value of a file's ``split``
    column."""

    input_column: str = "input"
    output_column: str = "output"
    choices_column: str = "choices"
    """Column names of ``data``; the choices (a list, or text separated by ``|``) are optional."""

    @classmethod
    def parse(cls, scenario: str, arguments: Mapping[str, Any], without: Sequence[str] = ()) -> Source:
        """Read run-entry arguments; ``without`` names those that the scenario does not use.

        Raises:
            UsageError: for an unknown argument, or a seed that is not a whole number.
        """
        known = [field.name for field in dataclasses.fields(cls) if field.name not in without]
        for name in arguments:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UsageError(f"{scenario} has no argument {name!r}{hint}: use {', '.join(known)}")
        if not isinstance(arguments.get("seed", 0), int):
            raise UsageError(f"{scenario}: seed={arguments['seed']!r} is not a whole number")
        return cls(**arguments)

    def changed(self) -> dict[str, Any]:
        """The arguments that are not at their defaults, in order."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }


class TaskScenario(Scenario):
    """A scenario over one task. A subclass sets class attributes only; HELM finds it by its ``name``."""

    task: ClassVar[Task]
    title: ClassVar[str] = ""
    """The name in tables, where it is not ``name`` in words."""

    methods: ClassVar[Sequence[str]] = (ADAPT_GENERATION,)
    """What a run entry's ``method=`` may be, the default first; with one method there is no such argument."""

    def __init_subclass__(cls) -> None:
        """Register the subclass with HELM."""
        super().__init_subclass__()
        if "name" in vars(cls):
            run_spec_function(cls.name)(cls.run_spec)

    @classmethod
    def run_spec(cls, **arguments: Any) -> RunSpec:
        """The run specification of a run entry; raises UsageError for an unknown argument or method."""
        method = arguments.pop("method", cls.methods[0]) if len(cls.methods) > 1 else cls.methods[0]
        if method not in cls.methods:
            raise UsageError(f"{cls.name}: method={method!r} is not offered: use {', '.join(cls.methods)}")
        source = Source.parse(cls.name, arguments).changed()
        chooses = method != ADAPT_GENERATION
        return make_run_spec(
            cls,
            {"method": method} | source if chooses else source,
            source | {"require_choices": True} if chooses else source,
            adapter_spec(cls.task.layout, method),
            get_exact_match_metric_specs() if chooses else get_basic_metric_specs(list(GENERATION_METRICS)),
        )

    def __init__(self, require_choices: bool = False, **arguments: Any) -> None:
        """``require_choices`` refuses data without choices; the other arguments are those of `Source`."""
        super().__init__()
        self.definition_path = f"{type(self).__module__.replace('.', '/')}.py"
        self.require_choices = require_choices
        self.source = Source.parse(self.name, arguments)

    def get_instances(self, output_path: str) -> list[Instance]:
        """In-context examples ("train") and evaluation instances ("test"); DataError for bad ``data``."""
        if self.source.data:
            return list(_instances_from_data(self.source, self.require_choices))
        seed = self.source.seed
        shots = itertools.islice(examples(self.task, seed, held_out=False), NUM_TRAIN)
        held_out = itertools.islice(examples(self.task, seed, held_out=True), NUM_TEST)
        return [
            make_instance(example.input, example.output, example.choices, split)
            for split, part in ((TRAIN_SPLIT, shots), (TEST_SPLIT, held_out))
            for example in part
        ]

    def get_metadata(self) -> ScenarioMetadata:
        """What helm-summarize prints."""
        return metadata(self, ("?", "back-office records"), "exact_match", self.title)


def metadata(scenario: Scenario, about: tuple[str, str], metric: str, title: str = "") -> ScenarioMetadata:
    """What helm-summarize prints of a scenario; ``about`` is its task and what its texts are."""
    task, what = about
    title = title or scenario.name.replace("_", " ").capitalize()
    return ScenarioMetadata(
        name=scenario.name, display_name=title, description=scenario.description,
        taxonomy=TaxonomyInfo(task=task, what=what, when="n/a", who="n/a", language="English"),
        main_metric=metric, main_split="test",
    )  # fmt: skip


def make_instance(text: str, output: str, choices: tuple[str, ...], split: str) -> Instance:
    """A HELM instance; without choices, the answer is the only reference."""
    references = [
        Reference(Output(text=choice), tags=[CORRECT_TAG] if choice == output else [])
        for choice in (choices or (output,))
    ]
    return Instance(input=Input(text=text), references=references, split=split)


def _instances_from_data(source: Source, require_choices: bool) -> Iterator[Instance]:
    """Instances from the user's rows.

    The in-context examples are, in this order of preference: rows whose ``split`` column is "train"; the
    ``train`` split of the hub data set; the first tenth of the rows (at least 5, at most 50).
    """
    splits = hub_splits(source.data)
    wanted = source.split or TEST_SPLIT
    rows = list(read_rows(source.data, wanted))
    if not rows:
        raise DataError(f"{source.data}: no rows")
    if TRAIN_SPLIT in splits and wanted != TRAIN_SPLIT:
        shots = itertools.islice(read_rows(source.data, TRAIN_SPLIT), NUM_TRAIN)
        marked = [(row, TRAIN_SPLIT) for row in shots] + [(row, TEST_SPLIT) for row in rows]
    elif not splits and "split" in rows[0][1]:
        marked = [(row, _split_of(row)) for row in rows]
        if source.split:
            marked = [
                (row, TRAIN_SPLIT if split == TRAIN_SPLIT else TEST_SPLIT)
                for row, split in marked
                if split in (TRAIN_SPLIT, source.split)
            ]
    else:
        num_shots = min(NUM_TRAIN, max(5, len(rows) // 10), len(rows) - 1)
        marked = [(row, TRAIN_SPLIT if i < num_shots else TEST_SPLIT) for i, row in enumerate(rows)]
    for row, split in marked:
        text = text_field(row, source.input_column, "input_column")
        output = text_field(row, source.output_column, "output_column")
        choices = list_field(row, source.choices_column)
        if require_choices and not choices:
            raise DataError(
                f"{row[0]}: no {source.choices_column!r} to choose from: add them, or use method=generation"
            )
        if choices and output not in choices:
            raise DataError(
                f"{row[0]}: {source.output_column} {output!r} is not among the {source.choices_column} "
                f"{', '.join(choices)}: add it to them"
            )
        yield make_instance(text, output, choices, split)


def _split_of(row: LocatedRow) -> str:
    split = text_field(row, "split", "split")
    if split not in ALL_SPLITS:
        raise DataError(f"{row[0]}: split {split!r} is unknown: use {', '.join(ALL_SPLITS)}")
    return split


def adapter_spec(layout: PromptLayout, method: str) -> AdapterSpec:
    """The prompt layout as one of HELM's adaptation methods, at temperature 0."""
    if method == ADAPT_MULTIPLE_CHOICE_JOINT:
        return get_multiple_choice_joint_adapter_spec(
            layout.instructions,
            input_noun=None,
            output_noun="Answer",
            input_suffix="\n",
            max_train_instances=layout.shots,
            max_tokens=1,
        )
    adapter = AdapterSpec(
        method=method,
        instructions=layout.instructions + "\n",
        input_prefix=layout.input_prefix,
        input_suffix=layout.input_suffix,
        output_prefix=layout.output_prefix,
        output_suffix=layout.output_suffix,
        max_train_instances=layout.shots,
        num_outputs=1,
        max_tokens=layout.max_tokens,
        temperature=0.0,
        stop_sequences=["\n"],
    )
    if method == ADAPT_GENERATION:
        return adapter
    # The prompt must end with the reference, so the newline that ends a block moves between the blocks:
    # the text is the same as in the generation layout.
    return dataclasses.replace(
        adapter, instructions=layout.instructions, output_suffix="", instance_prefix="\n\n", max_tokens=0,
        stop_sequences=[],
    )  # fmt: skip


def make_run_spec(
    scenario: type[Scenario],
    named: Mapping[str, Any],
    arguments: Mapping[str, Any],
    adapter: AdapterSpec,
    metrics: list[MetricSpec],
) -> RunSpec:
    """A run specification of a scenario.

    Args:
        named: arguments of the run entry that are not at their defaults; they are part of the run's name.
        arguments: those of the scenario's constructor.
    """
    suffix = ",".join(f"{key}={value}" for key, value in named.items())
    return RunSpec(
        name=f"{scenario.name}:{suffix}" if suffix else scenario.name,
        scenario_spec=ScenarioSpec(f"{scenario.__module__}.{scenario.__qualname__}", dict(arguments)),
        adapter_spec=adapter,
        metric_specs=metrics,
        groups=[scenario.name],
    )
