"""``plan`` and ``--policy auto``: from the command line to a policy that runs, and back from a manifest."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from engine.errors import PolicyError
from engine.planner import own_profile
from engine.profiler import measure_profile
from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.spec.request import Request
from engine.spec.settings import EngineSettings
from engine.units import MIB
from harness import cli, config
from harness.commands.run import DEMO_MODEL
from harness.engines.auto import PlannedEngine, resolve_policy, with_auto
from tests.support.profiles import make_profile

SHORT = shlex.split("plan --model opt-1.3b --num-requests 8 --prompt-len 64 --gen-len 8 --device-memory 2GiB")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> HardwareProfile:
    """A coarse profile of this machine."""
    return measure_profile("cpu", tmp_path_factory.mktemp("offload"), seconds=1)


def test_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SHORT, "--profile", "t4"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "best policy: ",
        "binding: ",
        "the next best:",
        "why the obvious alternatives lose:",
        "simulated",
    ):
        assert words in printed
    assert "does not fit: " in printed


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_profile().save(tmp_path / "made-up.json")
    assert cli.main([*SHORT, "--profile", str(tmp_path / "made-up.json"), "--json", "--no-disk"]) == 0
    plan = json.loads(capsys.readouterr().out)
    best = plan["best"]
    assert plan["profile"]["name"] == "made-up" and plan["kind"] == "simulated"
    assert Policy.from_mapping(best["policy"]).weights.disk == 0
    for tier in best["memory"].values():
        assert tier["planned"] <= tier["limit"]
    assert best["predicted"]["generated_tokens"] == 64 and len(plan["others"]) >= 3


def test_examples(capsys: pytest.CaptureFixture[str]) -> None:
    epilog = config.commands_of(cli.build_parser())["plan"].epilog or ""
    assert epilog.count("  run_helm.py plan") == 3
    assert cli.main([*SHORT, "--profile", "h200", "--block-seconds", "100"]) == 0


def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(SHORT) == 2
    assert "holds no profile of this machine" in capsys.readouterr().err
    assert cli.main([*SHORT, "--profile", "t4", "--host-memory", "1MiB"]) == 2
    assert "of host memory, which has 1.00 MiB" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{}")
    assert cli.main([*SHORT, "--profile", "bad.json"]) == 2
    assert "is not a profile" in capsys.readouterr().err


def test_own_profile(tmp_path: Path, here: HardwareProfile) -> None:
    assert own_profile(tmp_path / "none", "cpu") is None
    make_profile(unified=True).save(tmp_path / "other.json")
    assert own_profile(tmp_path, "cpu") is None
    here.save(tmp_path / "here.json")
    assert own_profile(tmp_path, "cpu") == here


def auto_settings(folder: Path, profile: HardwareProfile, budgets: Budgets) -> EngineSettings:
    profile.save(folder / "profiles" / "here.json")
    return EngineSettings(str(DEMO_MODEL), device="cpu", budgets=budgets, offload_dir=folder / "offload")


@pytest.mark.parametrize("formats", ["auto", "auto,weight_quant=4,kv_quant=4"])
def test_auto_answers_within_its_plan(tmp_path: Path, here: HardwareProfile, formats: str) -> None:
    requests = [Request(tuple(range(5, 5 + length)), 4) for length in (9, 30, 17, 5)]
    budget = 40 * MIB
    budgets = Budgets(host=budget)
    settings = auto_settings(tmp_path, here, budgets)
    wanted, said = Policy.parse(formats, with_auto({})), list[str]()
    engine = PlannedEngine(settings, wanted, said.append, tmp_path / "profiles")
    try:
        outputs = engine.answer(requests)
        record = engine.record()
    finally:
        engine.close()
    assert [len(output.tokens) for output in outputs] == [4] * 4 and "predicted" in said[0]
    predicted = record.predicted
    assert predicted is not None
    assert predicted.profile == here.name and predicted.predicted["seconds"] > 0
    policy = record.run_policy()
    assert policy.name == formats and str(policy.weight_quant) == ("4" if "4" in formats else "16")
    planned = {tier: entry["planned"] for tier, entry in predicted.memory.items()}
    assert planned["device"] + planned["host"] <= budget
    assert record.memory["device"].peak <= planned["device"]
    assert record.memory["disk"].peak <= planned["disk"]
    notices: list[str] = []
    again = resolve_policy(settings, wanted, requests, notices.append, record, tmp_path / "profiles")
    assert again.policy == policy and "as in the session before" in notices[0]
    assert again.predicted == predicted


def test_the_word_is_taken() -> None:
    with pytest.raises(PolicyError, match="rename it"):
        with_auto({"auto": Policy()})
