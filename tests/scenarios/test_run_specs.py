"""HELM builds every run entry, its adapter writes the demo's prompt layout, own data become instances."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("helm")
pyhocon = pytest.importorskip("pyhocon")

from helm.benchmark.adaptation.adapters import adapter  # noqa: E402
from helm.benchmark.adaptation.adapters.adapter_factory import AdapterFactory  # noqa: E402
from helm.benchmark.adaptation.request_state import RequestState  # noqa: E402
from helm.benchmark.run_spec import RunSpec, get_run_spec_function  # noqa: E402
from helm.benchmark.scenarios.scenario import Instance, create_scenario, with_instance_ids  # noqa: E402
from helm.common.object_spec import parse_object_spec  # noqa: E402

import scenarios.plugin  # noqa: E402
from engine.errors import UsageError  # noqa: E402
from engine.spec.policy import Policy  # noqa: E402
from scenarios.demo.evaluate import MODEL  # noqa: E402
from scenarios.records import DataError  # noqa: E402
from scenarios.tasks import OWN_TASKS, PRODUCT_RANKING, examples, is_held_out  # noqa: E402

FOLDER = Path(scenarios.plugin.__file__).parent
METHODS = [
    "generation",
    "multiple_choice_joint",
    "multiple_choice_separate_original",
    "multiple_choice_separate_calibrated",
]


def entries(name: str) -> list[str]:
    return [e["description"] for e in pyhocon.ConfigFactory.parse_file(str(FOLDER / name))["entries"]]


def run_spec(entry: str) -> RunSpec:
    parsed = parse_object_spec(entry)
    function = get_run_spec_function(parsed.class_name)
    assert function, entry
    return function(**parsed.args)


def instances(entry: str, output_path: str = "") -> list[Instance]:
    return with_instance_ids(create_scenario(run_spec(entry).scenario_spec).get_instances(output_path))


class Window:
    """Replaces HELM's window service, which needs a server, with the demo tokenizer and its 512 positions."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def length(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    def fits_within_context_window(self, text: str, expected_completion_token_length: int = 0) -> bool:
        return self.length(text) + expected_completion_token_length <= 512

    def truncate_from_right(self, text: str, expected_completion_token_length: int = 0) -> str:
        assert self.fits_within_context_window(text, expected_completion_token_length)
        return text


@pytest.fixture(scope="module")
def window() -> Window:
    return Window()


@pytest.fixture
def adapt(window: Window, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(adapter.WindowServiceFactory, "get_window_service", lambda *_: window)

    def adapt_entry(entry: str, eval_count: int, output_path: str = "") -> tuple[RunSpec, list[RequestState]]:
        spec = run_spec(entry)
        found = instances(entry, output_path)
        chosen = [i for i in found if i.split == "train"] + [i for i in found if i.split != "train"][
            :eval_count
        ]
        adapter_spec = dataclasses.replace(spec.adapter_spec, num_train_trials=3)
        return spec, AdapterFactory.get_adapter(adapter_spec, None).adapt(chosen, 1)  # type: ignore[arg-type]

    return adapt_entry


def test_every_paper_entry_is_one_that_helm_knows() -> None:
    specs = [run_spec(entry) for entry in entries("run_entries_paper.conf")]
    assert len({spec.name for spec in specs}) == 7


@pytest.mark.parametrize("entry", entries("run_entries_demo.conf"))
def test_demo_prompts_fit_the_demo_model_with_all_their_shots(
    entry: str, adapt, window: Window, tmp_path: Path
) -> None:
    spec, states = adapt(entry, 20, str(tmp_path))
    asked = [state for state in states if state.request_mode != "calibration"]  # which has no shots
    assert all(state.num_train_instances == spec.adapter_spec.max_train_instances for state in asked)
    longest = max(window.length(state.request.prompt) for state in states)
    assert longest + spec.adapter_spec.max_tokens <= 512


@pytest.mark.parametrize("name", OWN_TASKS)
def test_helm_writes_the_prompt_layout_of_the_task(name: str, adapt) -> None:
    layout = OWN_TASKS[name].layout
    _, states = adapt(name, 5)
    by_input = {e.input: e for e in itertools.islice(examples(OWN_TASKS[name], 0, held_out=False), 50)}
    for state in states:
        prompt = state.request.prompt
        shots = sorted(
            (e for e in by_input.values() if e.input in prompt), key=lambda e: prompt.index(e.input)
        )
        assert len(shots) == layout.shots
        last = layout.question_block(state.instance.input.text)
        assert prompt == "\n".join([layout.instructions + "\n", *map(layout.block, shots), last])


@pytest.mark.parametrize("name", ["data_imputation", "error_detection", "product_matching"])
def test_scoring_prompts_are_generation_prompts_with_a_reference(name: str, adapt) -> None:
    _, generation = adapt(name, 2)
    _, scoring = adapt(f"{name}:method=multiple_choice_separate_original", 2)
    prompts = {state.request.prompt for state in generation}
    for state in scoring:
        reference = " " + state.instance.references[state.reference_index].output.text
        assert state.request.prompt.endswith(reference)
        assert state.request.prompt.removesuffix(reference) in prompts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["data_imputation", "error_detection", "product_matching"])
def test_every_method_makes_requests(name: str, method: str, adapt) -> None:
    spec, states = adapt(f"{name}:method={method}", 2)
    assert spec.adapter_spec.method == method and states
    assert (states[0].request.max_tokens == 0) == ("separate" in method)


def test_demo_text_is_held_out_and_can_pass_the_window(window: Window) -> None:
    assert all(is_held_out(i.input.text) for i in instances("demo_text")[:50])
    assert window.length(instances("demo_text:paragraphs=12")[0].input.text) > 512


@pytest.mark.parametrize("name", [*OWN_TASKS, "product_ranking"])
def test_evaluation_instances_are_not_of_the_training_side(name: str) -> None:
    found = instances(name)
    task = (OWN_TASKS | {"product_ranking": PRODUCT_RANKING})[name]
    by_input = {
        e.input: e.context
        for side in (True, False)
        for e in itertools.islice(examples(task, 0, held_out=side), 500)
    }
    for instance in found:
        assert is_held_out(by_input[instance.input.text]) == (instance.split == "test")
    assert sum(i.split == "test" for i in found) == 500


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("information_extraction:sead=7", "no argument 'sead' (did you mean 'seed'?)"),
        ("information_extraction:seed=many", "seed='many' is not a whole number"),
        ("information_extraction:method=generation", "no argument 'method'"),
        ("error_detection:method=ranking", "method='ranking' is not offered"),
        ("demo_text:output_column=a", "no argument 'output_column'"),
        ("demo_text:paragraphs=0", "not a whole number of at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(entry: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        instances(entry)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_ranking_orders_by_answer_and_probability(adapt) -> None:
    from helm.common.request import GeneratedOutput, RequestResult

    from scenarios.product_ranking import RankOfCorrectMetric

    spec, states = adapt("product_ranking", 1)
    # One instance, three candidates, three train trials.
    assert len(states) == 9 and "Product A: title" in states[0].request.prompt
    correct = next(s for s in states[:3] if s.instance.references[s.reference_index].is_correct)
    wrong = [s for s in states[:3] if s is not correct]

    def ranks(*given: tuple[RequestState, str, float]) -> dict[str, float]:
        answered = []
        for state, text, logprob in given:
            completion = GeneratedOutput(text=text, logprob=logprob, tokens=[])
            result = RequestResult(success=True, embedding=[], completions=[completion], cached=False)
            answered.append(dataclasses.replace(state, result=result))
        stats = RankOfCorrectMetric().evaluate_references(spec.adapter_spec, answered, None, "")  # type: ignore[arg-type]
        return {stat.name.name: stat.mean for stat in stats}

    first, second = wrong
    assert ranks((first, " No", -0.1), (correct, " Yes", -0.9), (second, "?", 0.0))["exact_match"] == 1
    assert (
        ranks((first, " Yes", -0.1), (correct, " Yes", -0.9), (second, " No", -0.1))["reciprocal_rank"] == 0.5
    )
    assert (
        ranks((first, " No", -0.9), (correct, " No", -0.1), (second, " Yes", -2.0))["reciprocal_rank"]
        == 1 / 3
    )


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_own_rows_become_instances(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": "Yes", "choices": ["Yes", "No"]} for i in range(60)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = instances(f"error_detection:data={data},input_column=text,output_column=label")
    assert [i.split for i in found] == ["train"] * 6 + ["test"] * 54  # the first tenth are examples
    assert [r.output.text for r in found[0].references] == ["Yes", "No"]
    assert found[0].first_correct_reference.output.text == "Yes"


def test_a_split_column_decides(tmp_path: Path) -> None:
    rows = [
        {"input": f"{i}", "output": "a", "split": s} for i, s in enumerate(["train", "valid", "test", "test"])
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert [i.split for i in instances(f"form_processing:data={data}")] == ["train", "valid", "test", "test"]
    assert [i.split for i in instances(f"form_processing:data={data},split=valid")] == ["train", "test"]


def test_a_data_set_folder_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, count in (("train", 4), ("test", 3)):
        write_rows(
            folder / f"{split}.jsonl", [{"input": f"{split} {i}", "output": "a"} for i in range(count)]
        )
    found = instances(f"form_processing:data={folder}")
    assert [(i.input.text, i.split) for i in found[3:5]] == [("train 3", "train"), ("test 0", "test")]
    assert len(found) == 7
    with pytest.raises(DataError, match="dev"):
        instances(f"form_processing:data={folder},split=dev")


@pytest.mark.parametrize(
    ("rows", "entry", "expected"),
    [
        ([{"input": "a", "answer": "b"}], "form_processing:data={}", "row 1: no column 'output'"),
        (
            [{"input": "a", "output": "b", "split": "dev"}],
            "form_processing:data={}",
            "split 'dev' is unknown",
        ),
        (
            [{"input": "a", "output": "b", "choices": ["c", "d"]}],
            "error_detection:data={}",
            "'b' is not among the choices c, d",
        ),
        (
            [{"input": "a", "output": "b"}],
            "error_detection:data={},method=multiple_choice_joint",
            "no 'choices' to choose from",
        ),
        ([], "form_processing:data={}", "no rows"),
    ],
)
def test_malformed_rows_are_one_line(tmp_path: Path, rows: list[dict], entry: str, expected: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        instances(entry.format(data))
    assert data in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)


def test_policies_are_read_by_the_engine() -> None:
    policies = yaml.safe_load((FOLDER / "policies.yaml").read_text())
    parsed = {name: Policy.from_mapping({"name": name, **keys}) for name, keys in policies.items()}
    assert list(parsed) == ["resident", "offloaded", "offloaded-4bit", "flexgen"]
    assert parsed["flexgen"].padding == 256 and not parsed["flexgen"].shares_prefixes
    assert parsed["resident"].weights.device == 1 and not parsed["resident"].weight_quant
    assert parsed["offloaded"].weights.disk == parsed["offloaded"].kv.disk == 0.9
    assert parsed["offloaded-4bit"].weight_quant and parsed["offloaded-4bit"].kv_quant
    assert parsed["offloaded-4bit"].weights == parsed["offloaded"].weights
