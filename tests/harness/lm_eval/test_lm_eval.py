"""Tasks of lm-evaluation-harness get the scores of lm-eval's own class for transformers models."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

pytest.importorskip("lm_eval")

from engine.engine import Engine
from engine.spec.policy import Policy
from harness import cli
from harness.commands.lm_eval import EPILOG
from harness.lm_eval.evaluate import LmEvalOptions, LmEvalResult, evaluate, find_tasks, key_values
from harness.progress.line import Progress
from harness.tokenizer import Text
from tests.harness.lm_eval.lm_eval_tasks import save_tasks
from tests.harness.openai_batch.batch_files import ROOT, TEMPLATE, examples
from tests.support.tiny_models import copy_with_template

TASKS = ("my_choice", "my_answers", "my_texts", "my_likely")


@pytest.fixture(scope="module")
def model(tiny_opt_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    return copy_with_template(tiny_opt_dir, tmp_path_factory.mktemp("lm-eval") / "tiny-chat", TEMPLATE)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model, Policy.parse("device_batch=5,num_device_batches=2")) as engine:
        yield engine


@pytest.fixture(scope="module")
def text(model: Path) -> Text:
    return Text.load(str(model))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, engine: Engine, text: Text) -> Path:
    for number in range(1000):  # until greedy decoding gives text, which is rare for a random model
        context = f"Answer {number}:"
        (output,) = engine.generate([(2, *text.encode(context))], 1)
        likely = text.join(output.tokens).decode(errors="replace")
        if likely.isascii() and text.encode(context + likely) == (*text.encode(context), *output.tokens):
            break
    return save_tasks(tmp_path_factory.mktemp("tasks"), context, likely)


@pytest.fixture(autouse=True)
def environment_unasked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval describes the environment with a dozen subprocesses, which takes seconds; one test does so."""
    if "command_prints" not in request.node.name:
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


def ours(engine: Engine, text: Text, tasks: Path, *names: str, **settings: Any) -> LmEvalResult:
    given = {"include_path": str(tasks), **settings}
    options = LmEvalOptions(names or TASKS, given, {"pretrained": "tiny"})
    return evaluate(engine, text, options, Progress())


def theirs(model: Path, tasks: Path, *names: str, **settings: Any) -> dict[str, Any]:
    """The same tasks by lm-eval's own class for transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager, found = find_tasks(names or TASKS, str(tasks))
    hf = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4)
    results = simple_evaluate(model=hf, tasks=found, task_manager=manager, **settings)
    assert results is not None
    return dict(results)


def scores(results: dict[str, Any]) -> dict[str, float]:
    """Every figure of every task, including standard errors and perplexities."""
    return {
        f"{task} {name}": value
        for task, values in results["results"].items()
        for name, value in values.items()
        if isinstance(value, float)
    }


def read_samples(result: LmEvalResult) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for path in result.files:
        if path.name.startswith("samples_"):
            name = path.name.removeprefix("samples_").rpartition("_")[0]
            found[name] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def same(got: Any, wanted: Any) -> None:
    """Assert equal texts and verdicts, and log-probabilities within 1e-4."""
    if isinstance(wanted, list | tuple):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            same(one, other)
    elif isinstance(wanted, float) or isinstance(got, float):
        assert float(got) == pytest.approx(float(wanted), abs=1e-4, rel=1e-6)
    else:
        assert str(got) == str(wanted)


def test_every_request_type_scores_as_transformers_do(
    engine: Engine, text: Text, model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = Engine.answer
    monkeypatch.setattr(
        Engine, "answer", lambda *args, **more: calls.append(len(args[1])) or plain(*args, **more)
    )
    result = ours(engine, text, tasks, output_path=str(tmp_path), log_samples=True)
    expected = theirs(model, tasks, log_samples=True)
    assert len(calls) == 3, "one call per request type, whatever the number of tasks"
    assert scores(result.results) == pytest.approx(scores(expected), rel=1e-5)
    samples = read_samples(result)
    assert set(samples) == set(TASKS)
    for task, wanted in expected["samples"].items():
        for one, other in zip(samples[task], wanted, strict=True):
            assert one["doc_hash"] == other["doc_hash"] and one["prompt_hash"] == other["prompt_hash"]
            same(one["filtered_resps"], other["filtered_resps"])
    greedy = [sample["filtered_resps"][0][1] for sample in samples["my_likely"]]
    assert greedy[:2] == ["True", "False"], "both verdicts were met"


def test_examples_and_limits_are_those_of_lm_eval(
    engine: Engine, text: Text, model: Path, tasks: Path
) -> None:
    names, settings = ("my_choice", "my_answers"), {"num_fewshot": 2, "limit": 4}
    result = ours(engine, text, tasks, *names, **settings)
    expected = theirs(model, tasks, *names, log_samples=False, **settings)
    assert scores(result.results) == pytest.approx(scores(expected), rel=1e-5)
    assert result.results["n-samples"] == expected["n-samples"]


def test_shortened_prompts_are_counted(
    engine: Engine, text: Text, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours(engine, text, tasks, "my_choice", "my_answers")
    said = capsys.readouterr().err
    assert "loglikelihood: 2 of 29 prompts are longer than the window and lose their beginning" in said
    assert "generate_until: 1 of 6 prompts are longer" in said


def test_chat_template_and_system_instruction(
    engine: Engine, text: Text, model: Path, tasks: Path, tmp_path: Path
) -> None:
    names, settings = (
        ("my_choice", "my_answers"),
        {"apply_chat_template": True, "system_instruction": "Be brief."},
    )
    result = ours(
        engine, text, tasks, *names, log_samples=True, output_path=str(tmp_path), num_fewshot=1, **settings
    )
    expected = theirs(model, tasks, *names, num_fewshot=1, fewshot_as_multiturn=True, **settings)
    for task, wanted in expected["samples"].items():
        for one, other in zip(read_samples(result)[task], wanted, strict=True):
            assert one["arguments"]["gen_args_0"]["arg_0"] == other["arguments"][0][0]
            same(one["filtered_resps"], other["filtered_resps"])


def test_sampling_is_drawn_from_the_seed(engine: Engine, text: Text, tasks: Path, tmp_path: Path) -> None:
    def texts(folder: str, seed: int) -> list[str]:
        arguments = {"do_sample": True, "temperature": 1.0, "top_k": 50, "max_gen_toks": 8}
        result = ours(
            engine, text, tasks, "my_answers", gen_kwargs=arguments, seed=[0, 0, seed, 0], log_samples=True,
            output_path=str(tmp_path / folder),
        )  # fmt: skip
        return [sample["resps"][0][0] for sample in read_samples(result)["my_answers"]]

    assert texts("a", 1) == texts("b", 1) != texts("c", 2)


def test_repeated_requests_are_draws_of_their_own(engine: Engine, text: Text) -> None:
    from lm_eval.api.instance import Instance

    from harness.lm_eval.model import EngineLM

    def asked(sampled: bool) -> list[str]:
        arguments = ("Answer:", {"until": [], "max_gen_toks": 12, "do_sample": sampled, "temperature": 1.0})
        instance = Instance("generate_until", {}, arguments, 0, repeats=3)
        return EngineLM(engine, text, 0, Progress()).generate_until([instance] * 3)

    assert len(set(asked(sampled=True))) == 3 and len(set(asked(sampled=False))) == 1


def test_answers_are_kept_and_reused(
    engine: Engine, text: Text, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("my_choice", "my_answers", "my_texts")
    first = ours(engine, text, tasks, *names, use_cache=str(tmp_path / "kept"))
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "answer", None)
        again = ours(engine, text, tasks, *names, use_cache=str(tmp_path / "kept"))
    assert scores(again.results) == scores(first.results)


def test_an_interrupted_evaluation_loses_what_was_in_flight_only(
    engine: Engine, text: Text, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Engine.answer, []

    def interrupted(self: Engine, requests: Any, on_output: Any, on_progress: Any) -> Any:
        def some(index: int, output: Any) -> None:
            if index == 7:
                raise KeyboardInterrupt
            on_output(index, output)

        return plain(self, requests, on_output=some, on_progress=on_progress)

    def counted(self: Engine, requests: Any, **more: Any) -> Any:
        calls.append(len(requests))
        return plain(self, requests, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "answer", interrupted)
        ours(engine, text, tasks, "my_choice", use_cache=str(tmp_path / "kept"))
    monkeypatch.setattr(Engine, "answer", counted)
    ours(engine, text, tasks, "my_choice", use_cache=str(tmp_path / "kept"))
    assert 0 < calls[0] < 29, "29 requests, some of them answered before"


def run(model: Path, tasks: Path, *more: str) -> int:
    return cli.main(["lm-eval", "--model", str(model), "--include_path", str(tasks), *more])


def test_command_prints_the_table_and_writes_the_files(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    more = (
        "-t",
        "my_choice,my_answers",
        "-o",
        str(output),
        "-s",
        "-L",
        "3",
        "--gen_kwargs",
        "max_gen_toks=5",
    )
    assert run(model, tasks, *more, "--policy", "resident,weight_quant=4", "-f", "1") == 0
    printed = capsys.readouterr().out
    assert "|my_choice " in printed and "acc_norm" in printed and "limit: 3.0, num_fewshot: 1" in printed
    (results,) = output.glob("*/results_*.json")
    found = json.loads(results.read_text())
    assert found["results"]["my_choice"]["acc,none"] >= 0
    assert found["config"]["model_args"] == {"pretrained": str(model), "policy": "resident,weight_quant=4"}
    assert found["config"]["engine"]["policy"]["weight_quant"] == "4"
    assert found["configs"]["my_answers"]["generation_kwargs"]["max_gen_toks"] == 5
    assert len(list(output.glob("*/samples_*.jsonl"))) == 2
    assert all(f"results: {path}" in printed for path in output.glob("*/*"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-t", "my_answers", "--gen_kwargs", "num_beams=4"), "num_beams=4 is not available"),
        (
            ("-t", "my_answers", "--gen_kwargs", "max_gen_toks=256"),
            "max_gen_toks=256 leaves no tokens for a prompt",
        ),
        (("-t", "my_answers", "--gen_kwargs", "hot"), "--gen_kwargs 'hot' is not key=value"),
        (("-t", "my_answers", "-b", "8"), "-b/--batch_size is not available: the policy says it"),
        (("-t", "my_answers", "--model_args", "pretrained=x"), "give --model"),
        (("-t", "my_answers", "-s"), "--output_path"),
        (("-t", "my_answers", "--seed", "1,x"), "not one or four whole numbers"),
        (("-t", ","), "names no task"),
        (("-t", "my_answers", "--fewshot_as_multiturn"), "apply_chat_template"),
        (("-t", "my_answers", "--include_path", "none"), "is not a folder"),
        (("-t", "my_answers", "--policy", "fast"), "no policy is called 'fast'"),
        (("-t", "my_choice", "--host-memory", "20KiB"), "needs"),
    ],
)
def test_errors_are_one_line(
    model: Path, tasks: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], reason: str
) -> None:
    assert run(model, tasks, *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and reason in last


def test_a_task_that_fails_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = save_tasks(tmp_path / "tasks")
    (tasks / "my_choice.jsonl").unlink()
    assert run(model, tasks, "-t", "my_choice") == 1
    assert "error: lm-eval failed (FileNotFoundError" in capsys.readouterr().err.splitlines()[-1]


def test_a_chat_needs_a_template(tiny_opt_dir: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_opt_dir, tasks, "-t", "my_choice", "--apply_chat_template") == 2
    assert "needs a tokenizer with a chat template" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_cannot_be_written_is_found_out_first(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(model, tasks, "-t", "my_choice", "-o", str(tmp_path / "file" / "out")) == 1
    assert "cannot make" in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_lm_eval_is_named_with_its_cure(
    model: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(model, tasks, "-t", "my_choice") == 2
    (only,) = capsys.readouterr().err.splitlines()
    assert "not installed" in only and "pip install 'lm-eval>=0.4.13,<0.5'" in only


def test_examples_of_the_help_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scenarios").symlink_to(ROOT / "scenarios")
    save_tasks(tmp_path / "my_tasks")
    monkeypatch.chdir(tmp_path)
    found = examples(EPILOG)
    assert len(found) == 3
    for arguments in found:
        assert cli.main(arguments) == 0, arguments
    assert len(list(tmp_path.glob("results/lm-eval/*/samples_*"))) == 2


def test_the_lock_holds_what_the_extra_asks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = map(Requirement, project["optional-dependencies"]["lm-eval"])
    pins = dict(
        line.split("==") for line in (ROOT / "requirements-dev.lock").read_text().splitlines() if "==" in line
    )
    assert extra.specifier.contains(pins[extra.name])


def test_pairs_are_read_as_lm_eval_reads_them() -> None:
    assert key_values(["a=1,b=[2,3]", "c=x"], "--f") == {"a": 1, "b": [2, 3], "c": "x"}
    assert key_values(['{"until": ["\\n"]}'], "--f") == {"until": ["\n"]}


@pytest.mark.slow
def test_tasks_of_lm_evals_own_are_found_and_misspelt_ones_named(tasks: Path) -> None:
    from engine.errors import UsageError

    assert find_tasks(["arc_easy", "my_choice"], str(tasks))[1] == ["arc_easy", "my_choice"]
    with pytest.raises(UsageError, match="did you mean 'my_choice'"):
        find_tasks(["my_choise"], str(tasks))
