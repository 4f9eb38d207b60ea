"""Whole comparisons: with fake children that end in every possible way, and with the real Accelerate."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from harness import cli
from harness.baselines import registry
from harness.baselines.sandbox.environments import Environment
from harness.commands.run import DEMO_MODEL
from harness.comparison.options import CompareOptions, MemoryCap, Trial
from harness.comparison.rows import COLUMNS
from harness.comparison.runner import run_comparison
from harness.comparison.series import Series
from tests.harness.baselines.test_child import FAKE, can_limit


class Fakes:
    """Starts the fake child in place of each system's, so that no environment is needed; counts starts."""

    def __init__(self, **ways: str) -> None:
        self.ways = ways
        self.started: list[str] = []

    def __call__(self, environment: Environment) -> Sequence[str]:
        name = environment.baseline.name
        self.started.append(name)
        return [sys.executable, "-I", "-S", str(FAKE), self.ways.get(name, "answers")]


def options(tmp_path: Path, **more: object) -> CompareOptions:
    """Of a small comparison on a folder that only looks like a checkpoint."""
    model = tmp_path / "model"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps({"vocab_size": 50}))
    (model / "model.safetensors").write_bytes(b"x" * 1000)
    chosen: dict[str, object] = {
        "systems": ["ours/full", "accelerate", "llama-cpp/f16", "petals"], "prompt_len": 3, "gen_len": 4,
        "repeats": 2, "most_batch": 2, "timeout_s": 30.0, "output_path": tmp_path / "out",
    }  # fmt: skip
    return CompareOptions(model, "mine", **(chosen | more))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERBENCH_BASELINES", str(tmp_path / "baselines"))


def test_every_end_is_a_row(tmp_path: Path) -> None:
    fakes = Fakes(accelerate="dies")
    result = run_comparison(options(tmp_path), fakes)
    found = {(row["system"], row["kind"]): row for row in result.rows}
    assert found["ours", "measured"]["status"] == "ok"
    assert found["ours", "measured"]["agreement"] == 1.0
    assert found["ours", "measured"]["generated_tokens_per_s"] > 0
    assert found["accelerate", "measured"]["status"] == "failed"
    assert "something broke" in found["accelerate", "measured"]["reason"]
    assert found["llama-cpp", "measured"]["status"] == "not_installed"
    assert "baselines install llama-cpp" in found["llama-cpp", "measured"]["reason"]
    assert found["petals", "measured"]["status"] == "not_run"
    assert found["petals", "published"]["generated_tokens_per_s"] == 0.08
    assert sum(row["system"] == "ours" for row in result.rows) == 2  # the repeats
    for name in ("not_installed", "something broke", "published, not run here", "ours/full"):
        assert name in result.shown
    work = tmp_path / "out" / "offload" / "comparisons"
    assert work.is_dir() and not list(work.glob("*run-*")), "what children offload goes with them"


def test_damaged_records_are_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_comparison(options(tmp_path), Fakes())
    journal = tmp_path / "out" / "comparisons" / "mine" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:-1], lines[-1].replace(b'"ok"', b'"OK"', 1)]))
    again = Fakes()
    result = run_comparison(options(tmp_path), again)
    assert set(again.started) == {"ours"} and sum(row["status"] == "ok" for row in result.rows) == 4
    assert "1 damaged line is ignored" in capsys.readouterr().err


def test_the_files_hold_the_same_rows(tmp_path: Path) -> None:
    result = run_comparison(options(tmp_path), Fakes(accelerate="other-tokens"))
    folder = tmp_path / "out" / "comparisons" / "mine"
    frame, text = pd.read_parquet(folder / "comparison.parquet"), pd.read_csv(folder / "comparison.csv")
    assert list(frame.columns) == list(COLUMNS) == list(text.columns)
    assert len(frame) == len(text) == len(result.rows)
    theirs = frame[(frame.system == "accelerate") & (frame.kind == "measured")]
    assert list(theirs.agreement) == [0.0, 0.0]
    assert theirs.logit_distance.iloc[0] == 0.0
    assert json.loads(theirs.settings.iloc[0])["map"] in ("layers", "cpu")
    assert json.loads(theirs.versions.iloc[0]) == {"fake": "1"}
    assert "fake_child.py" in theirs.command.iloc[0]
    ratio = next(line for line in result.shown.splitlines() if "accelerate/disk" in line and "16" in line)
    assert ratio
    about = json.loads((folder / "comparison.json").read_text())
    assert about["reference"]["status"] == "ok"
    assert "device_map" in about["choices"]["accelerate"]["choices"]
    assert set(pd.read_parquet(folder / "search.parquet").workload) == {"search: probe", "search: search"}


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = Fakes()
    run_comparison(options(tmp_path), first)
    again = Fakes()
    result = run_comparison(options(tmp_path), again)
    assert first.started and not again.started
    assert sum(row["status"] == "ok" for row in result.rows) == 4
    journal = tmp_path / "out" / "comparisons" / "mine" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-2]) + lines[-1][:40])  # killed in the middle of a line
    rest = Fakes()
    run_comparison(options(tmp_path), rest)
    assert set(rest.started) == {"ours", "accelerate"}
    assert len(journal.read_bytes().splitlines()) == len(lines)
    longer = Fakes()
    run_comparison(options(tmp_path, repeats=3), longer)
    assert longer.started.count("accelerate") == 1


def test_what_depends_on_other_weights_is_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = Fakes(), Fakes()
    run_comparison(options(tmp_path), first)
    given = options(tmp_path)
    (given.model / "model.safetensors").write_bytes(b"x" * 999 + b"y")
    capsys.readouterr()
    run_comparison(given, again)
    assert again.started == first.started
    said = capsys.readouterr().err
    assert "records of an earlier comparison are not used, since these changed: weights or config" in said


def test_failures_are_tried_again_and_outcomes_are_not(tmp_path: Path) -> None:
    systems = {"systems": ["ours/full"]}
    run_comparison(options(tmp_path, **systems), Fakes(ours="dies"))
    fixed = Fakes()
    run_comparison(options(tmp_path, **systems), fixed)
    assert "ours" in fixed.started
    run_comparison(options(tmp_path / "b", **systems), Fakes(ours="refused"))
    again = Fakes()
    result = run_comparison(options(tmp_path / "b", **systems), again)
    assert "ours" not in again.started
    assert result.rows[0]["status"] == "refused"


def test_rounds_change_their_order(tmp_path: Path) -> None:
    fakes = Fakes()
    run_comparison(options(tmp_path, systems=["ours/full", "ours/8bit"], batches={"": 1}, repeats=2), fakes)
    # One child for the reference, then per round one of each; 8bit packs its weights once before.
    assert fakes.started[0] == "transformers"
    journal = tmp_path / "out" / "comparisons" / "mine" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 5


def test_a_fixed_batch_is_not_searched(tmp_path: Path) -> None:
    chosen = options(tmp_path, systems=["ours/full", "ours/8bit", "accelerate"], repeats=1, most_batch=4)
    fixed = replace(chosen, batches={"ours/8bit": 3, "accelerate": 2})
    result = run_comparison(fixed, Fakes())
    batches = {(row["system"], row["configuration"]): row["batch"] for row in result.rows}
    assert batches["ours", "8bit"] == 3 and batches["accelerate", "disk"] == 2
    tried = pd.read_parquet(tmp_path / "out" / "comparisons" / "mine" / "search.parquet")
    searched = tried[tried.workload == "search: search"]
    assert set(searched.configuration) == {"full"} and set(searched.batch) == {1, 2, 4}


def test_a_batch_is_fixed_for_a_configuration_before_its_system_before_all(tmp_path: Path) -> None:
    chosen = options(tmp_path, systems=["ours/full", "ours/8bit", "accelerate"], repeats=1)
    result = run_comparison(replace(chosen, batches={"": 8, "ours": 2, "ours/8bit": 3}), Fakes())
    ok = [row for row in result.rows if row["status"] == "ok"]
    batches = {(row["system"], row["configuration"]): row["batch"] for row in ok}
    assert batches == {("ours", "full"): 2, ("ours", "8bit"): 3, ("accelerate", "disk"): 8}


def test_a_search_begins_where_it_is_told(tmp_path: Path) -> None:
    chosen = options(tmp_path, systems=["ours/full", "accelerate"], repeats=1, most_batch=8)
    run_comparison(replace(chosen, first_batches={"ours": 4}), Fakes())
    tried = pd.read_parquet(tmp_path / "out" / "comparisons" / "mine" / "search.parquet")
    sizes = tried[tried.workload == "search: search"].groupby("system").batch.apply(set)
    assert sizes["ours"] <= {4, 8, 2, 1} and {4, 8} <= sizes["ours"] and 1 in sizes["accelerate"]


def test_variants_are_probed_by_several_sequences_or_by_one(tmp_path: Path) -> None:
    def probed(more: Path, **ways: str) -> set[int]:
        run_comparison(options(more, systems=["accelerate"], repeats=1, most_batch=8), Fakes(**ways))
        tried = pd.read_parquet(more / "out" / "comparisons" / "mine" / "search.parquet")
        return set(tried[tried.workload == "search: probe"].batch)

    assert probed(tmp_path / "a") == {4}
    assert probed(tmp_path / "b", accelerate="refused") == {4, 1}


@pytest.mark.parametrize("completes", [True, False])
def test_the_next_fastest_variant_is_searched_where_the_fastest_completes_nothing(
    completes: bool, tmp_path: Path
) -> None:
    baseline = registry.get("accelerate")
    variants = baseline.variants("disk", True)
    rates = [float(1 + index % 3) for index in range(len(variants))]

    def run(series: Series, trial: Trial) -> dict[str, object]:
        if trial.purpose == "probe":
            return {"status": "ok", "generated_tokens_per_s": rates[variants.index(trial.settings)]}
        if completes and rates[variants.index(trial.settings)] < 3:
            return {"status": "ok", "generated_tokens_per_s": 0.1 * trial.batch}
        return {"status": "out_of_memory", "reason": "killed"}

    environment = Environment(baseline, tmp_path)
    series = Series(baseline, environment, "disk", MemoryCap("half", 1000), {}, {}, 16)
    series.choose(options(tmp_path), run)
    searched = [variants.index(trial.settings) for trial, _ in series.tried if trial.purpose == "search"]
    by_speed = sorted(range(len(rates)), key=lambda index: -rates[index])
    if completes:
        assert series.failure is None and series.batch == 2
        assert rates[searched[0]] == 3 and rates[searched[-1]] == 2 == rates[variants.index(series.settings)]
    else:
        assert searched == by_speed and series.failure is not None and series.batch is None


def test_a_limit_that_kills_is_a_row(tmp_path: Path) -> None:
    if reason := can_limit():
        pytest.skip(reason)
    chosen = options(tmp_path, systems=["ours/full", "accelerate"], memory_caps=["none", "64MiB"])
    result = run_comparison(chosen, Fakes(ours="hungry"))
    ours = [row for row in result.rows if row["system"] == "ours"]
    assert [row["status"] for row in ours] == ["ok", "ok", "out_of_memory"]
    assert ours[-1]["memory_cap_bytes"] == 64 << 20
    assert ours[-1]["cap_enforced"].startswith("cgroup v")
    assert "out_of_memory: killed for memory" in result.shown


def test_a_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = options(tmp_path)
    command = ["compare", "--model", str(chosen.model), "--systems", "ours,llama-cpp", "--memory-cap", "50%",
               "none", "--dry-run", "-o", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "ours/full: at most" in shown and "not run: not installed" in shown and "all in RAM" in shown
    assert not (tmp_path / "out").exists()
    for wrong, message in (
        (["--systems", "ours/fast"], "no configuration 'fast'"),
        (["--set", "ours.speed=1"], "has no setting"),
        (["--memory-cap", "some"], "memory-cap takes"),
        (["--batch", "0"], "--batch 0 gives no whole number above 0"),
        (["--batch", "4,ours=many"], "--batch ours=many gives no whole number"),
        (["--batch", "nobody=4"], "nobody"),
        (["--output", "../x"], "not a folder's name"),
    ):
        assert cli.main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_accelerate_for_real(tmp_path: Path) -> None:
    """The demo model with its layers on disk generates the tokens of plain transformers."""
    chosen = CompareOptions(
        DEMO_MODEL, "real", ["accelerate"], prompt_len=8, gen_len=4, repeats=1, batches={"": 2},
        timeout_s=120.0, output_path=tmp_path,
        overrides={"accelerate": {"dtype": "float32", "map": "layers"}},
    )  # fmt: skip
    result = run_comparison(chosen)
    (row,) = [row for row in result.rows if row["kind"] == "measured"]
    assert row["status"] == "ok", row["reason"]
    assert row["agreement"] == 1.0
    assert row["logit_distance"] < 1e-5
    assert row["prefill_s"] > 0 and row["decode_s"] > 0
    assert json.loads(row["versions"])["accelerate"]
