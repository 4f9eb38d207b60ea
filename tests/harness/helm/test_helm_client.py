"""The client for stock helm-run gives a suite's answers, batches calls of threads, and isolates errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("helm.benchmark")

from helm.common.object_spec import create_object
from helm.common.request import Request
from helm.proxy.retry import NonRetriableException

from engine.errors import RequestError, StorageError
from engine.spec.request import Output
from harness.helm.client import Gatherer, TierbenchClient
from harness.suite.runner import SuiteResult, run_suite
from harness.tokenizer import Text
from tests.harness.conftest import PLUGIN, OptionsMaker
from tests.support.counting_engine import CountingEngine

ROOT = Path(__file__).resolve().parents[3]

ENTRIES = ("toy_generation", "toy_sampling", "toy_separate", "information_extraction")
"""Greedy, sampled, scored, and one of our own scenarios, which helm-run finds by the entry point."""


@pytest.fixture
def engine(tiny_opt_dir: Path) -> Any:
    """An engine over the tiny model."""
    CountingEngine.calls.clear()
    with CountingEngine(tiny_opt_dir) as counting:
        yield counting


def request(prompt: str, **changes: Any) -> Request:
    values: dict[str, Any] = {"temperature": 0.0, "max_tokens": 4, "stop_sequences": []}
    return Request(model="m", model_deployment="m", prompt=prompt, **(values | changes))


def test_calls_of_many_threads_are_few_batches(engine: CountingEngine, tiny_opt_dir: Path) -> None:
    gatherer = Gatherer(engine, Text.load(str(tiny_opt_dir)), 0, 0.2)
    requests = [request(f"water {i}") for i in range(15)] + [request("water 0")]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(gatherer.ask, requests))
    assert len(engine.calls) <= 4 and max(engine.calls) == 8
    alone = [gatherer.ask(single) for single in requests[:3]]
    for one, many in [*zip(alone, together, strict=False), (together[0], together[-1])]:
        (first,), (second,) = one.completions, many.completions
        assert first.text == second.text and first.logprob == pytest.approx(second.logprob, abs=1e-4)


def test_a_request_that_cannot_be_answered_fails_alone(engine: CountingEngine, tiny_opt_dir: Path) -> None:
    gatherer = Gatherer(engine, Text.load(str(tiny_opt_dir)), 0, 0.2)
    wrong = [request("a", presence_penalty=1), request("word " * 400)]
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(gatherer.ask, r) for r in (request("a"), *wrong, request("b"))]
    errors = [future.exception() for future in futures]
    assert errors[0] is None and errors[3] is None
    assert isinstance(errors[1], RequestError) and isinstance(errors[2], RequestError)


def test_a_failing_engine_fails_all_its_callers(
    engine: CountingEngine, tiny_opt_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> list[Output]:
        raise StorageError("the disk is full")

    monkeypatch.setattr(engine, "answer", full)
    gatherer = Gatherer(engine, Text.load(str(tiny_opt_dir)), 0, 0.05)
    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(gatherer.ask, request(str(i))) for i in range(3)]
    assert all(isinstance(future.exception(), StorageError) for future in futures)


def test_clients_of_one_model_and_policy_share_an_engine(tiny_opt_dir: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        same = list(threads.map(lambda _: TierbenchClient(str(tiny_opt_dir)), range(4)))
    other = TierbenchClient(str(tiny_opt_dir), policy={"kv_quant": 4})
    assert len({id(client._gatherer) for client in same}) == 1
    assert other._gatherer is not same[0]._gatherer


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "no/where/at/all"}, "no/where/at/all"),
        ({"policy": {"kv_quan": 4}}, "did you mean 'kv_quant'"),
        ({"device": "tpu"}, "'tpu'"),
    ],
)
def test_what_cannot_be_used_is_not_tried_again(
    tiny_opt_dir: Path, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(NonRetriableException, match=said):
        TierbenchClient(**({"model": str(tiny_opt_dir)} | arguments))


def test_a_budget_that_is_too_small_is_not_tried_again(tiny_opt_dir: Path) -> None:
    client = TierbenchClient(str(tiny_opt_dir), host_memory=1024)
    with pytest.raises(NonRetriableException, match="in the host tier, which has"):
        client.make_request(request("a"))


@pytest.fixture(scope="module")
def suite(make_options: OptionsMaker, tmp_path_factory: pytest.TempPathFactory) -> SuiteResult:
    """A suite of the entries; helm-run reads its prod_env."""
    folder = tmp_path_factory.mktemp("suite")
    return run_suite(make_options(folder, run_entries=ENTRIES, max_eval_instances=5, seed=3))


def test_the_configuration_that_a_run_leaves_behind_makes_the_client(suite: SuiteResult) -> None:
    import cattrs
    import yaml
    from helm.benchmark.model_deployment_registry import ModelDeployments

    path = suite.folder.parent.parent / "prod_env" / "model_deployments.yaml"
    (deployment,) = cattrs.structure(yaml.safe_load(path.read_text()), ModelDeployments).model_deployments
    assert deployment.client_spec.args["seed"] == 3 and deployment.client_spec.args["policy"]["name"]
    assert isinstance(create_object(deployment.client_spec), TierbenchClient)


def test_the_documented_entry_makes_the_client(tiny_opt_dir: Path) -> None:
    import cattrs
    import yaml
    from helm.benchmark.model_deployment_registry import ModelDeployments

    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "helm_run.md").read_text(), re.S)
    content = yaml.safe_load(text.replace("/path/to/model", str(tiny_opt_dir)))
    (deployment,) = cattrs.structure(content, ModelDeployments).model_deployments
    result = create_object(deployment.client_spec).make_request(request("water"))
    assert result.success and len(result.completions[0].tokens) == 4


def test_helm_run_gives_the_answers_of_a_suite(suite: SuiteResult, tmp_path: Path) -> None:
    """Stock helm-run in a process of its own, with the project's entry points and the files of the suite."""
    installed = tmp_path / "tierbench-0.1.0.dist-info"
    installed.mkdir()
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["helm"]
    (installed / "entry_points.txt").write_text(
        "[helm]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
    )
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tierbench\nVersion: 0.1.0\n")
    output = suite.folder.parent.parent
    entries = [f"{entry}:model=tierbench/tiny-opt_resident" for entry in ENTRIES]
    command = [
        sys.executable, "-m", "helm.benchmark.run", "--run-entries", *entries, "--plugins", PLUGIN, "-m", "5",
        "--suite", "stock", "-o", str(tmp_path), "--local-path", str(output / "prod_env"), "-n", "6",
        "--disable-cache", "--exit-on-error",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=tmp_path, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count("is the fast way") == 1
    names = {row.run_name for row in suite.rows}
    assert len(names) == len(ENTRIES)
    for name in names:
        ours, theirs = (_answers(folder / name) for folder in (suite.folder, tmp_path / "runs" / "stock"))
        assert len(ours) == len(theirs) > 0
        for own, stock in zip(ours, theirs, strict=True):
            assert own["request"] == stock["request"]
            assert [c["text"] for c in own["completions"]] == [c["text"] for c in stock["completions"]]
            for mine, other in zip(own["completions"], stock["completions"], strict=True):
                assert mine["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
                assert mine["finish_reason"] == other["finish_reason"]


def _answers(folder: Path) -> list[dict[str, Any]]:
    states = json.loads((folder / "scenario_state.json").read_text())["request_states"]
    return [{"request": s["request"], "completions": s["result"]["completions"]} for s in states]
