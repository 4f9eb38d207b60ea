"""A suite that is killed in the middle continues where it stopped and ends with the same files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.errors import UsageError
from engine.spec.policy import Policy
from harness.files import HELM_FILES, SuiteStore
from harness.suite.options import SuiteOptions
from harness.suite.runner import run_suite
from tests.harness.conftest import PLUGIN, OptionsMaker
from tests.harness.files import assert_close, comparable
from tests.support.counting_engine import CountingEngine

pytest.importorskip("helm.benchmark")

ROOT = Path(__file__).resolve().parents[3]

ENTRIES = ["toy_generation:eval_instances=90", "toy_separate"]
BLOCKS = "name=blocks,weights=disk,kv=0/0.5/0.5"
SINGLE = "name=single,device_batch=1,num_device_batches=1"
POLICIES = [Policy.parse(BLOCKS), Policy.parse(SINGLE)]
REQUESTS = 90 + 12


@pytest.fixture(scope="module")
def options(make_options: OptionsMaker, tmp_path_factory: pytest.TempPathFactory) -> SuiteOptions:
    output = tmp_path_factory.mktemp("killed")
    return make_options(output, run_entries=ENTRIES, policies=POLICIES)


def kill_after(options: SuiteOptions, journal: Path, answers: int) -> None:
    """Run the program and kill it with signal 9 once ``answers`` answers are in the journal."""
    command = [
        sys.executable,
        str(ROOT / "run_helm.py"),
        "run",
        "--no-report",
        "--model",
        options.settings.model,
    ]
    command += ["--model-name", options.model_name, "--policy", BLOCKS, SINGLE, "--run-entries", *ENTRIES]
    command += ["--plugins", PLUGIN, "--suite", options.suite, "-o", str(options.output_path)]
    command += ["--local-path", str(options.local_path)]
    # With this process's number of threads: how a sum is split between threads changes its last digits.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.read_bytes().count(b"\n") < answers:
            if process.poll() is not None:
                assert process.stderr is not None
                pytest.fail(f"it ended by itself: {process.stderr.read().decode()[-2000:]}")
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)


def test_kill_and_go_on(options: SuiteOptions, make_options: OptionsMaker, tmp_path: Path) -> None:
    folder = options.output_path / "runs" / options.suite
    blocks, single = (folder / "policies" / name / "journal.jsonl" for name in ("blocks", "single"))
    kill_after(options, blocks, answers=15)  # in the first block of several
    assert 15 <= blocks.read_bytes().count(b"\n") < REQUESTS
    (left,) = [json.loads(path.read_text()) for path in folder.glob("policies/*/manifest.json")]
    assert left["engine"]["totals"]["passes"] > 0 and left["engine"]["totals"]["prompt_tokens"] > 0
    kill_after(options, single, answers=15)
    with single.open("ab") as file:  # as if it had been killed in the middle of a line
        file.write(b'{"key": "half a li')
    kept = single.read_bytes().count(b"\n")
    assert 15 <= kept < REQUESTS and not (folder / "table.json").exists()

    CountingEngine.calls.clear()
    run_suite(options, CountingEngine)
    assert CountingEngine.calls == [REQUESTS - kept], "what was in the journals was not asked again"
    assert [path.read_bytes().count(b"\n") for path in (blocks, single)] == [REQUESTS, REQUESTS]

    whole = make_options(tmp_path, run_entries=ENTRIES, policies=POLICIES)
    whole_folder = run_suite(whole, CountingEngine).folder
    resumed, expected = comparable(folder), comparable(whole_folder)
    peaks = resumed["table.json"].pop("peaks"), expected["table.json"].pop("peaks")
    assert peaks[0]["single"] == peaks[1]["single"]
    for tier, most in peaks[1]["blocks"].items():  # of which the KV cache is but a part
        assert 0.8 * most <= peaks[0]["blocks"][tier] <= 1.2 * most, tier
    assert_close(resumed, expected)
    exact = [name for name in expected if name.split("/")[0].endswith("_single")]
    assert len(exact) == len(ENTRIES) * len(HELM_FILES)
    assert all(resumed[name] == expected[name] for name in exact), "one sequence is always the same block"
    rows = [row for row in resumed["table.json"]["rows"] if row["policy"] == "single"]
    assert len(rows) == len(ENTRIES) and all(row in expected["table.json"]["rows"] for row in rows)

    def names(place: Path) -> set[str]:
        return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}

    assert names(folder) == names(whole_folder)


def test_the_manifest_keeps_earlier_sessions(
    options: SuiteOptions, tmp_path: Path, make_options: OptionsMaker
) -> None:
    first = make_options(tmp_path, run_entries=["toy_joint"])
    run_suite(first, CountingEngine)
    path = tmp_path / "runs" / "toy" / "policies" / "resident" / "manifest.json"
    before = json.loads(path.read_text())
    run_suite(make_options(tmp_path, run_entries=["toy_joint", "toy_separate"]))
    after = json.loads(path.read_text())
    assert after["earlier_sessions"] == [before["engine"]]
    assert after["engine"]["totals"]["requests"] == 12
    assert set(before["runs"]) < set(after["runs"])


def test_two_processes_do_not_share_a_suite(options: SuiteOptions) -> None:
    store = SuiteStore(options.output_path, options.suite)
    with store.locked(), pytest.raises(UsageError, match="another process is running suite"):
        run_suite(options, CountingEngine)


def test_remains_of_a_killed_process_are_removed(make_options: OptionsMaker, tmp_path: Path) -> None:
    store = SuiteStore(tmp_path, "toy")
    (store.staging / "half").mkdir(parents=True)
    (store.staging / "half" / "stats.json").write_text("{")
    run_suite(make_options(tmp_path, run_entries=["toy_joint"]))
    assert not store.staging.exists()
