"""Whole suites: every adaptation method, repeated and changed commands, HELM's own commands on the output."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import PolicyError
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from harness.suite.options import SuiteOptions
from harness.suite.runner import SuiteResult, run_suite
from harness.tokenizer import Text
from tests.harness.conftest import METHODS, OptionsMaker, with_settings
from tests.harness.files import comparable, read_states
from tests.support.counting_engine import CountingEngine
from tests.support.reference_engine import ReferenceEngine
from tests.support.tiny_models import save_tiny_gpt2, save_tiny_llama

pytest.importorskip("helm.benchmark")

BLOCKS = Policy(name="blocks", device_batch=5, num_device_batches=3)
SINGLE = Policy.parse(
    "name=single,device_batch=1,num_device_batches=1,schedule=sequential,weights=disk,kv=0/0.5/0.5"
)


@pytest.fixture
def calls() -> Iterator[list[int]]:
    CountingEngine.calls.clear()
    yield CountingEngine.calls
    CountingEngine.calls.clear()


@pytest.fixture(scope="module")
def options(make_options: OptionsMaker, tmp_path_factory: pytest.TempPathFactory) -> SuiteOptions:
    output = tmp_path_factory.mktemp("suite")
    return make_options(output, run_entries=METHODS, policies=[BLOCKS, SINGLE])


@pytest.fixture(scope="module")
def suite(options: SuiteOptions) -> SuiteResult:
    """Every adaptation method under two policies, by the engine."""
    return run_suite(options, CountingEngine)


@pytest.fixture(scope="module")
def reference(options: SuiteOptions, tmp_path_factory: pytest.TempPathFactory) -> SuiteResult:
    """The same suite by plain `transformers`, one request at a time."""
    output = tmp_path_factory.mktemp("reference")
    return run_suite(dataclasses.replace(options, output_path=output, policies=[BLOCKS]), ReferenceEngine)


def same_completions(mine: list[Any], other: list[Any], tolerance: float = 1e-4) -> None:
    assert len(mine) == len(other) > 0
    for a, b in zip(mine, other, strict=True):
        assert a["request"]["prompt"] == b["request"]["prompt"]
        for x, y in zip(a["result"]["completions"], b["result"]["completions"], strict=True):
            assert (x["text"], x["finish_reason"]) == (y["text"], y["finish_reason"])
            assert [t["text"] for t in x["tokens"]] == [t["text"] for t in y["tokens"]]
            logprobs = [t["logprob"] for t in y["tokens"]]
            assert [t["logprob"] for t in x["tokens"]] == pytest.approx(logprobs, abs=tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_a_block_answers_as_single_requests_do(suite: SuiteResult, method: str) -> None:
    same_completions(read_states(suite, method, "blocks"), read_states(suite, method, "single"))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "toy_sampling"])
def test_answers_are_those_of_plain_transformers(
    suite: SuiteResult, reference: SuiteResult, method: str
) -> None:
    same_completions(read_states(suite, method, "blocks"), read_states(reference, method, "blocks"))


@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_gpt2])
def test_other_tokenizers(make_options: OptionsMaker, tmp_path: Path, save: Callable[[Path], Path]) -> None:
    model = save(tmp_path / save.__name__)
    entries = ["toy_generation", "toy_calibrated", "toy_language_modeling"]
    mine, other = (
        run_suite(
            make_options(tmp_path / name, model=str(model), model_name=model.name, run_entries=entries),
            factory,
        )
        for name, factory in (("engine", CountingEngine), ("reference", ReferenceEngine))
    )
    for entry in entries:
        same_completions(read_states(mine, entry, "resident"), read_states(other, entry, "resident"))


def test_stats_are_those_of_plain_transformers(suite: SuiteResult, reference: SuiteResult) -> None:
    counts = {r.run_entry: (r.metric, r.instances, r.requests, r.prompt_tokens) for r in reference.rows}
    values = {row.run_entry: (row.accuracy, row.low, row.high) for row in reference.rows}
    for row in suite.rows:
        if row.run_entry != "toy_sampling":
            assert (row.metric, row.instances, row.requests, row.prompt_tokens) == counts[row.run_entry]
            assert (row.accuracy, row.low, row.high) == pytest.approx(values[row.run_entry], abs=1e-4)


def test_sampled_completions_are_real_draws(suite: SuiteResult) -> None:
    states = read_states(suite, "toy_sampling", "blocks")
    completions = [tuple(c["text"] for c in state["result"]["completions"]) for state in states]
    assert all(len(texts) == 3 for texts in completions)
    assert any(len(set(texts)) > 1 for texts in completions)
    assert {state["train_trial_index"] for state in states} == {0, 1}


def test_language_modeling_scores_every_token_once(suite: SuiteResult, options: SuiteOptions) -> None:
    text = Text.load(options.settings.model)
    states = read_states(suite, "toy_language_modeling", "blocks")
    assert len(states) > 4, "the texts are longer than the window"
    scored: dict[str, int] = {}
    for state in states:
        count = len(state["result"]["completions"][0]["tokens"]) - state.get("num_conditioning_tokens", 0)
        scored[state["instance"]["input"]["text"]] = scored.get(state["instance"]["input"]["text"], 0) + count
    for source, count in scored.items():
        assert abs(count - len(text.encode(source))) <= 2 * len(states), (
            "HELM trims half characters at the seams"
        )


def test_the_table_has_a_row_per_run_entry_and_policy(suite: SuiteResult) -> None:
    assert {(row.run_entry, row.policy) for row in suite.rows} == {
        (method, policy) for method in METHODS for policy in ("blocks", "single")
    }
    table = json.loads((suite.folder / "table.json").read_text())
    assert [row["run_entry"] for row in table["rows"]] == [row.run_entry for row in suite.rows]
    assert set(table["peaks"]) == {"blocks", "single"}
    assert table["peaks"]["single"]["disk"] > 0 == table["peaks"]["blocks"]["disk"]
    assert all(row.seconds > 0 and row.low <= row.accuracy <= row.high for row in suite.rows)
    assert (suite.folder / "table.md").read_text() == suite.shown


def test_efficiency_is_the_share_of_the_block(suite: SuiteResult) -> None:
    folder = next(suite.folder.glob("toy_joint:model=*_blocks"))
    stats = {
        s["name"]["name"]: s["mean"] for s in json.loads((folder / "stats.json").read_text()) if s.get("mean")
    }
    states = read_states(suite, "toy_joint", "blocks")
    shares = [state["result"]["request_time"] for state in states]
    assert stats["batch_size"] > 1
    assert stats["inference_denoised_runtime"] == pytest.approx(sum(shares) / len(shares))
    assert stats["inference_runtime"] == pytest.approx(
        stats["inference_denoised_runtime"] * stats["batch_size"], rel=0.2
    )


def test_manifests_say_what_the_results_are(suite: SuiteResult) -> None:
    manifest = json.loads((suite.folder / "policies" / "single" / "manifest.json").read_text())
    assert manifest["run_entries"] == list(METHODS)
    assert set(manifest["runs"]) == {row.run_name for row in suite.rows if row.policy == "single"}
    assert manifest["engine"]["policy"]["name"] == "single" and manifest["engine"]["kind"] == "measured"
    assert manifest["engine"]["totals"]["requests"] > 0
    assert manifest["versions"]["crfm-helm"] and manifest["seeds"]["sampling"] == 0
    trace = json.loads((suite.folder / "policies" / "single" / "trace.json").read_text())
    assert trace["traceEvents"]


def test_a_finished_suite_asks_nothing_again(
    suite: SuiteResult, options: SuiteOptions, calls: list[int]
) -> None:
    before = comparable(suite.folder)
    again = run_suite(options, CountingEngine)
    assert calls == []
    assert comparable(suite.folder) == before
    assert again.rows == suite.rows and again.shown == suite.shown


def test_a_lost_run_is_made_from_the_journal(
    suite: SuiteResult, options: SuiteOptions, calls: list[int]
) -> None:
    before = comparable(suite.folder, times=True)
    shutil.rmtree(next(suite.folder.glob("toy_sampling:model=*_single")))
    run_suite(options, CountingEngine)
    assert calls == [] and comparable(suite.folder, times=True) == before


@pytest.fixture(scope="module")
def small(make_options: OptionsMaker, tmp_path_factory: pytest.TempPathFactory) -> SuiteOptions:
    """A suite of one entry that has been run once."""
    options = make_options(tmp_path_factory.mktemp("small"), run_entries=["toy_joint"])
    run_suite(options, CountingEngine)
    return options


def changed(options: SuiteOptions, what: str, folder: Path) -> SuiteOptions:
    if what == "seed":
        return with_settings(options, seed=1)
    if what == "policy":
        return dataclasses.replace(options, policies=[Policy(name="resident", kv=Policy.parse("kv=disk").kv)])
    if what == "random weights":
        return with_settings(options, weights="random")
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(options.settings.model, folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.model.decoder.layers[0].fc1.weight.data += 0.01
    model.save_pretrained(folder / "model")
    return with_settings(options, model=str(folder / "model"))


@pytest.mark.parametrize("what", ["seed", "policy", "random weights", "model"])
def test_answers_of_other_circumstances_are_not_reused(
    small: SuiteOptions, what: str, tmp_path: Path, calls: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    run_suite(changed(small, what, tmp_path), CountingEngine)
    assert calls == [4]
    assert "are not used" in capsys.readouterr().err
    run_suite(small, CountingEngine)
    assert calls == [4], "the first answers are still there"


def test_a_larger_suite_asks_only_what_is_new(small: SuiteOptions, calls: list[int]) -> None:
    run_suite(dataclasses.replace(small, run_entries=["toy_joint", "toy_ranking"]), CountingEngine)
    assert len(calls) == 1 and calls[0] == 12


def test_a_run_that_cannot_be_scored_does_not_stop_the_others(
    make_options: OptionsMaker, tmp_path: Path, calls: list[int]
) -> None:
    options = make_options(
        tmp_path, run_entries=["toy_failing_metric", "toy_joint"], policies=[BLOCKS, SINGLE]
    )
    for _ in range(2):
        result = run_suite(options, CountingEngine)
        assert [(row.run_entry, row.policy) for row in result.rows] == [
            ("toy_joint", "blocks"),
            ("toy_joint", "single"),
        ]
        assert len(result.failures) == 2 and "punkt_tab not found" in result.failures[0]
        assert not list(result.folder.glob("toy_failing*"))
    assert calls == [8, 8], "answers are kept though they could not be scored"


def test_an_entrys_own_model_is_replaced(make_options: OptionsMaker, tmp_path: Path) -> None:
    (row,) = run_suite(
        make_options(tmp_path, run_entries=["toy_joint:model=openai/davinci"]), CountingEngine
    ).rows
    assert (row.run_entry, row.run_name) == ("toy_joint", "toy_joint:model=tierbench_tiny-opt_resident")


def test_equal_requests_are_asked_once(make_options: OptionsMaker, tmp_path: Path, calls: list[int]) -> None:
    result = run_suite(
        make_options(tmp_path, run_entries=["toy_calibrated", "toy_calibrated"]), CountingEngine
    )
    states = read_states(result, "toy_calibrated", "resident")
    assert len(states) == 24 and calls[0] < 24


def test_a_dry_run_answers_nothing(
    make_options: OptionsMaker, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.models.checkpoint.digest_of", None)  # nor reads the weights
    result = run_suite(make_options(tmp_path, dry_run=True, policies=[BLOCKS, SINGLE]), CountingEngine)
    assert calls == [] and not result.rows
    assert "toy_generation: 4, 4, " in result.shown
    assert "policy single" in result.shown and all(f"  {tier.value}: " in result.shown for tier in Tier)
    assert not (tmp_path / "prod_env" / "model_metadata.yaml").exists()
    assert not list(result.folder.glob("toy*"))


def test_policies_are_held_to_a_curve(make_options: OptionsMaker, tmp_path: Path, calls: list[int]) -> None:
    options = make_options(tmp_path, dry_run=True, policies=[BLOCKS, Policy.parse("weight_quant=2,name=two")])
    digest = json.dumps(_digest_of(options.settings.model))
    (tmp_path / "curve.json").write_text(f'{{"rows": [], "model": {{"digest": {digest}}}}}')
    with pytest.raises(PolicyError, match=r"'two' compresses by .* does not accept"):
        run_suite(dataclasses.replace(options, only_accepted=tmp_path / "curve.json"))
    run_suite(dataclasses.replace(options, only_accepted=tmp_path / "curve.json", policies=[BLOCKS]))
    assert not calls


def _digest_of(model: str) -> str:
    with Engine(model) as engine:
        return engine.spec.digest


def test_long_prompts_lose_examples_by_default(make_options: OptionsMaker, tmp_path: Path) -> None:
    result = run_suite(make_options(tmp_path, run_entries=["toy_generation:repeat=7"]), CountingEngine)
    states = read_states(result, "toy_generation", "resident")
    assert 1 in {state["num_train_instances"] for state in states}, "two were asked for"


@pytest.fixture(scope="module")
def summarized(suite: SuiteResult, options: SuiteOptions) -> Path:
    """The suite after the stock helm-summarize."""
    command = [sys.executable, "-m", "helm.benchmark.presentation.summarize", "--suite", options.suite]
    command += ["-o", str(options.output_path), "--local-path", str(options.local_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=options.output_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return suite.folder


def test_helm_summarize_has_a_row_per_policy(summarized: Path) -> None:
    models = {
        model["display_name"] for model in json.loads((summarized / "schema.json").read_text())["models"]
    }
    assert models == {"tiny-opt [blocks]", "tiny-opt [single]"}
    tables = json.loads((summarized / "groups" / "synthetic_reasoning.json").read_text())
    shown = {row[0]["value"] for table in tables for row in table["rows"]}
    assert shown == models
    assert len(json.loads((summarized / "runs.json").read_text())) == 2 * len(METHODS)


def test_helm_server_serves_it(summarized: Path, options: SuiteOptions) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "helm.benchmark.server", "-p", str(port), "--suite", options.suite]
    server = subprocess.Popen([*command, "-o", str(options.output_path)], cwd=options.output_path,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        fetch = fetcher(port, server)
        assert b"<html" in fetch("").lower()
        assert f'SUITE = "{options.suite}"'.encode() in fetch("config.js")
        runs = f"benchmark_output/runs/{options.suite}"
        assert json.loads(fetch(f"{runs}/summary.json"))["suites"] == [options.suite]
        run = next(summarized.glob("toy_joint:model=*_blocks")).name
        assert len(json.loads(fetch(f"{runs}/{run}/display_predictions.json"))) == 4
    finally:
        server.terminate()
        server.wait(timeout=20)


def fetcher(port: int, server: subprocess.Popen[bytes]) -> Callable[[str], bytes]:
    def fetch(path: str) -> bytes:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=20) as answer:
                    return bytes(answer.read())
            except ConnectionError:
                pass
            except urllib.error.URLError as error:
                if not isinstance(error.reason, ConnectionError):
                    raise
            assert server.poll() is None and time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.1)

    return fetch
