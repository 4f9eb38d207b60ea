"""The synthetic load from the command line: measured, predicted and projected figures, and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.spec.policy import Policy
from harness.cli import main
from harness.throughput import table as throughput_table
from harness.throughput.engines import Projection
from harness.throughput.load import Load, Times, deeper, extrapolated, measure
from harness.throughput.table import PaperTable
from tests.support.tiny_models import save_tiny_opt

BLOCK = "device_batch=2,num_device_batches=2"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a profile of this machine's CPU and a tiny model."""
    folder = tmp_path_factory.mktemp("workplace")
    save_tiny_opt(folder / "model")
    output = folder / "results" / "profiles" / "mine.json"
    arguments = ["profile", "--device", "cpu", "--seconds", "0.5", "--output", str(output)]
    assert main([*arguments, "--offload-dir", str(folder / "offload")]) == 0
    return folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    (workplace / "out.jsonl").unlink(missing_ok=True)
    return workplace


def run(*arguments: str) -> list[dict[str, Any]]:
    """The rows that a command appended."""
    usual = ["--output", "out.jsonl", "--device", "cpu", "--offload-dir", "offload", "--store", "store"]
    assert main(["throughput", *arguments, *usual]) == 0
    return [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]


def test_profile_prints_a_table_and_its_file(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from harness.throughput.profile_table import to_text

    profile = json.loads((workplace / "results" / "profiles" / "mine.json").read_text())
    from engine.spec.profile import HardwareProfile

    text = to_text(HardwareProfile.from_dict(profile))
    assert "| disk to host" in text and "| per layer" in text and "compute takes" in text
    assert main(["profile", "--seconds", "0"]) == 2
    assert "not a number of seconds" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    command = ["profile", "--device", "tpu", "--output", str(tmp_path / "p.json")]
    assert main(command) == 2
    assert "device 'tpu' is unknown" in capsys.readouterr().err


def test_a_load_is_measured_beside_its_prediction(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--model", "model", "--random-weights", "--prompt-len", "6", "--gen-len", "4"]
    (row, again) = run(*load, "--policy", f"weights=disk,kv=host,{BLOCK}", "--repeats", "2")
    assert row["kind"] == again["kind"] == "measured" and row["weights"] == "random"
    assert row["load"] == {"prompt_len": 6, "gen_len": 4, "requests": 4}
    both = row["prefill_seconds"] + row["decode_seconds"]
    assert row["throughput"]["total"] == pytest.approx(16 / both)
    assert row["throughput"]["prefill"] == pytest.approx(24 / row["prefill_seconds"])
    assert row["throughput"]["decode"] == pytest.approx(12 / row["decode_seconds"])
    assert both == pytest.approx(row["engine"]["totals"]["seconds"], rel=0.2)
    assert row["predicted"]["kind"] == "simulated" and row["predicted"]["throughput"]["total"] > 0
    assert row["memory"].keys() == {"memory", "disk"}
    assert all(0 < held["peak"] <= held["planned"] for held in row["memory"].values())
    shown = capsys.readouterr().out
    assert "measured |" in shown and "predicted" in shown and "random weights" in shown


def test_tiers_are_told_apart_on_a_device_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny_opt(tmp_path / "model")
    policy = Policy.parse(f"weights=host,kv=host,{BLOCK}")
    with Engine(folder, policy, device="pretend", offload_dir=tmp_path) as engine:
        found = measure(engine, Load(5, 3, 4))
    assert found.predicted is None and found.to_dict()["predicted"] is None
    assert found.peaks.keys() == {"device", "host", "disk"}
    assert all((held["peak"] or 0) <= (held["planned"] or 0) for held in found.peaks.values())


def test_fewer_passes_are_labelled_as_projected(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--model", "model", "--random-weights", "--prompt-len", "4", "--gen-len", "40", "--policy", BLOCK]
    (row,) = run(*load, "--project", "5")
    assert row["kind"] == "projected" and row["engine"]["totals"]["passes"] == 6
    assert row["memory"]["memory"] == {"planned": row["memory"]["memory"]["planned"], "peak": None}
    shown = capsys.readouterr().out
    assert "projected |" in shown and "Projected from fewer passes" in shown
    (_, whole) = run(*load, "--project", "39")  # no fewer than there are
    assert whole["kind"] == "measured" and whole["engine"]["totals"]["passes"] == 40
    # The same number of passes, whatever each took: none is counted twice or left out.
    assert row["throughput"]["decode"] == pytest.approx(4 * 39 / row["decode_seconds"])


def test_projected_passes_go_on_as_the_first_ones() -> None:
    seconds = [1.0 + 0.01 * i for i in range(20)]
    assert extrapolated(seconds[:6], 20) == pytest.approx(sum(seconds))
    assert extrapolated([1.0, 1.0, 9.0, 1.0, 1.0], 10) == pytest.approx(13 + 5)  # one slow pass alone
    assert extrapolated([2.0, 1.9, 1.8], 5) >= 2 * 1.8  # a pass never becomes shorter
    assert extrapolated([], 0) == 0


def test_fewer_layers_are_projected_by_what_a_layer_adds(here: Path) -> None:
    found = deeper(Times("measured", 1.0, 2.0), Times("measured", 1.5, 3.0), (2, 4), 12)
    assert (found.kind, found.prefill_seconds, found.decode_seconds) == ("projected", 3.5, 7.0)
    assert Projection.parse("8/4") == Projection(4, 8) and Projection.parse("3") == Projection(3)
    for text in ("1", "1/4", "many", "4/"):
        with pytest.raises(ValueError):
            Projection.parse(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "opt-125m"], "ships as a config without weights: add --random-weights"),
        (["--model", "model", "--random-weights", "--project", "4/4"], "shortens a model that ships as data"),
        (["--model", "model", "--random-weights", "--project", "1"], "not PASSES or LAYERS/PASSES"),
        (["--model", "model", "--table", "throughput-512"], "not allowed with"),
        (["--model", "model", "--random-weights", "--profile", "gone.json"], "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    usual = ["--device", "cpu", "--policy", BLOCK, "--gen-len", "8", "--prompt-len", "4"]
    assert main(["throughput", *arguments, *usual]) == 2
    assert said in capsys.readouterr().err


def test_another_machines_profile_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((here / "results" / "profiles" / "mine.json").read_text())
    content["machine"]["cpu"] = "another"
    (here / "other.json").write_text(json.dumps(content))
    arguments = ["throughput", "--model", "model", "--random-weights", "--profile", "other.json"]
    assert main([*arguments, "--device", "cpu", "--policy", BLOCK]) == 2
    assert "cpu='another', here it is" in capsys.readouterr().err


def test_a_policy_is_planned_for_the_load(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run("--model", "model", "--random-weights", "--prompt-len", "6", "--gen-len", "3",
                 "--num-requests", "4")  # fmt: skip
    assert row["kind"] == "measured" and row["load"]["requests"] == 4
    assert "policy auto: " in capsys.readouterr().out


def test_a_table_measures_what_fits_and_simulates_the_rest(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(throughput_table.TABLES, "throughput-512", PaperTable(8, 3, ("opt-125m", "opt-175b")))
    monkeypatch.setattr(throughput_table, "FORMATS", {"4 bits": "4"})
    policy = "weights=host,kv=host,device_batch=1,num_device_batches=1"
    rows = run("--table", "throughput-512", "--policy", policy, "--profile", "t4", "--at-most", "3000")
    kinds = {row["model"]: row["kind"] for row in rows}
    assert kinds == {"opt-125m": "measured", "opt-175b": "simulated"}
    small, large = rows
    assert small["engine"]["model"]["weights"] == "random" and small["machine"] != large["machine"]
    assert "t4" in large["machine"].lower() and "does not fit here" in large["note"]
    assert large["throughput"]["total"] > 0 and "predicted" not in large
    shown = capsys.readouterr().out
    assert "| opt-125m | 4 bits" in shown and "simulated" in shown


def test_a_table_needs_a_profile_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["throughput", "--table", "throughput-512", "--device", "cpu"]) == 2
    assert "run run_helm.py profile first" in capsys.readouterr().err


def test_a_suite_on_a_measured_machine_knows_the_bounds_of_its_lanes(here: Path, tmp_path: Path) -> None:
    """The bounds are those of the passes that the answers took, not of the longest possible ones."""
    pytest.importorskip("helm.benchmark")
    from engine.spec.settings import EngineSettings
    from harness.suite.options import SuiteOptions
    from harness.suite.runner import run_suite
    from tests.harness.conftest import PLUGIN

    options = SuiteOptions(
        EngineSettings("model", device="cpu"), model_name="tiny",
        policies=[Policy.parse(f"name=disk,weights=disk,{BLOCK}")], suite="bounds", output_path=tmp_path,
        run_entries=["toy_generation"], plugins=[PLUGIN], local_path=tmp_path / "prod_env", report=False,
    )  # fmt: skip
    run_suite(options)
    manifest = json.loads((tmp_path / "runs/bounds/policies/disk/manifest.json").read_text())
    streams = manifest["engine"]["streams"]
    assert manifest["engine"]["bounds_from"] and streams["compute"]["bound_seconds"] > 0
    assert streams["weights"]["bytes"] > 0 and streams["weights"]["bound_seconds"] > 0
    assert streams["weights"]["bound_seconds"] < 100 * streams["weights"]["busy_seconds"]
