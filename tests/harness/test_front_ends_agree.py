"""The same ten instances get the same answers from every front end: run, batch, lm-eval, helm-run, Python."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("helm.benchmark")

from engine.engine import Engine
from engine.spec.policy import Policy
from engine.spec.request import Request
from harness import cli
from harness.tokenizer import Text

MODEL = Path(__file__).resolve().parents[2] / "scenarios" / "demo" / "model"
POLICY = "name=p,weights=0/0.3/0.7,kv=0/0.5/0.5,device_batch=4,num_device_batches=2"
COUNT = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Ten instances as `run` asked and answered them, and what it said on standard error with --quiet."""
    folder = tmp_path_factory.mktemp("run")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main([
            "run", "-r", "synthetic_reasoning:mode=variable_substitution", "-m", str(COUNT),
            "--policy", POLICY, "--suite", "front-ends", "-o", str(folder),
            "--local-path", str(folder / "env"), "--no-report", "--quiet",
        ])  # fmt: skip
    assert code == 0
    (path,) = folder.glob("runs/front-ends/*/scenario_state.json")
    return json.loads(path.read_text())["request_states"], said.getvalue()


@pytest.fixture(scope="module")
def states(run: tuple[list[dict[str, Any]], str]) -> list[dict[str, Any]]:
    assert len(run[0]) == COUNT and run[1] == "", "--quiet says nothing of progress"
    return run[0]


def wanted(states: list[dict[str, Any]]) -> list[str]:
    answers = [state["result"]["completions"][0]["text"] for state in states]
    assert len(set(answers)) > COUNT // 2, "answers that differ, or agreement says nothing"
    return answers


def test_batch_file(states: list[dict[str, Any]], tmp_path: Path) -> None:
    lines = []
    for number, state in enumerate(states):
        asked = state["request"]
        body = {"prompt": asked["prompt"], "max_tokens": asked["max_tokens"], "temperature": 0,
                "stop": asked["stop_sequences"]}  # fmt: skip
        lines.append({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(["batch", *arguments, "--model", str(MODEL), "--policy", POLICY,
                     "--offload-dir", str(tmp_path / "offload")]) == 0  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = {r["custom_id"]: r["response"]["body"]["choices"][0]["text"] for r in records}
    assert [found[str(number)] for number in range(COUNT)] == wanted(states)


def test_lm_eval_task(states: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    rows = [
        {"prompt": s["request"]["prompt"], "answer": s["instance"]["references"][0]["output"]["text"]}
        for s in states
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.json").write_text(json.dumps(rows))
    task = {
        "task": "my_ten", "dataset_path": "json", "test_split": "train", "output_type": "generate_until",
        "dataset_kwargs": {"data_files": str(tmp_path / "tasks" / "rows.json")},
        "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": states[0]["request"]["stop_sequences"], "do_sample": False,
            "max_gen_toks": states[0]["request"]["max_tokens"],
        },
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    (tmp_path / "tasks" / "my_ten.yaml").write_text(json.dumps(task))
    assert cli.main(["lm-eval", "--tasks", "my_ten", "--include_path", str(tmp_path / "tasks"),
                     "--model", str(MODEL), "--policy", POLICY, "--output_path", str(tmp_path / "out"),
                     "--log_samples", "--offload-dir", str(tmp_path / "offload")]) == 0  # fmt: skip
    (path,) = (tmp_path / "out").rglob("samples_my_ten_*.jsonl")
    samples = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda s: s["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == wanted(states)


def test_client_of_helm_run(states: list[dict[str, Any]], tmp_path: Path) -> None:
    from helm.common import request as helm

    from harness.helm.client import TierbenchClient

    policy = {key: value for key, value in Policy.parse(POLICY).to_dict().items() if key != "name"}
    client = TierbenchClient(str(MODEL), policy=policy, offload_dir=str(tmp_path / "offload"))
    found = []
    for state in states:
        asked = {
            key: state["request"][key] for key in ("prompt", "max_tokens", "temperature", "stop_sequences")
        }
        result = client.make_request(helm.Request(model="m", model_deployment="m", **asked))
        found.append(result.completions[0].text)
    client._gatherer._engine.close()  # else it stays open until the process ends
    assert found == wanted(states)


def test_python(states: list[dict[str, Any]], tmp_path: Path) -> None:
    text = Text.load(str(MODEL))
    requests = [
        Request(
            (*text.start_ids, *text.encode(state["request"]["prompt"])),
            state["request"]["max_tokens"],
            stop=text.stop_check(state["request"]["stop_sequences"]),
            stop_token_ids=text.end_ids,
        )
        for state in states
    ]
    with Engine(MODEL, Policy.parse(POLICY), offload_dir=tmp_path / "offload") as engine:
        outputs = engine.answer(requests)
    found = [text.join(output.tokens).decode().split("\n")[0] for output in outputs]
    assert found == wanted(states)
