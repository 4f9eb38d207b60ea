"""Environments of other systems: their states, their isolation, and how an installation fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UsageError
from harness import cli
from harness.baselines import registry
from harness.baselines.base import Baseline, Generated, Ids, Job
from harness.baselines.sandbox import environments
from harness.baselines.sandbox.environments import Environment, InstallError


class Small(Baseline):
    """A baseline without an adapter, whose requirements each test sets, so that nothing real is installed."""

    name = "small"
    title = "Small"
    choices = "none"
    requirements = ()

    def load(self, job: Job) -> dict[str, Any]:
        raise NotImplementedError

    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        raise NotImplementedError


def small(folder: Path, *requirements: str) -> Environment:
    """The environment of a `Small` with these requirements."""
    baseline = Small()
    baseline.requirements = requirements
    return Environment(baseline, folder / "small")


def test_the_folder_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERBENCH_BASELINES", str(tmp_path / "there"))
    assert environments.environment_of(registry.get("llama-cpp")).folder == tmp_path / "there" / "llama-cpp"
    monkeypatch.delenv("TIERBENCH_BASELINES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environments.root() == tmp_path / "tierbench" / "baselines"


def test_states(tmp_path: Path) -> None:
    environment = small(tmp_path, "thing==1")
    assert environment.state == "not installed"
    assert environment.missing == "not installed: run_helm.py baselines install small"
    environment.folder.mkdir()
    assert environment.state == "unfinished"
    stamp = environment.folder / "tierbench.json"
    stamp.write_text(json.dumps({"requirements": ["thing==0"]}))
    assert environment.state == "outdated"
    stamp.write_text(json.dumps({"requirements": ["thing==1"]}))
    assert environment.state == "ready"
    assert not environment.missing
    assert environments.remove(environment)
    assert not environments.remove(environment)


def test_a_child_sees_none_of_our_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = small(tmp_path, "thing==1")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(environment.folder)], check=True, timeout=60
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    code = "import importlib.util as u, sys; print(u.find_spec('torch'), u.find_spec('numpy'), sys.prefix)"
    found = subprocess.run(
        [str(environment.python), "-I", "-c", code],
        env=environment.variables(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert found.stdout.split() == ["None", "None", str(environment.folder)]


def test_an_installation_that_fails_names_its_log(tmp_path: Path) -> None:
    environment = small(tmp_path, str(tmp_path / "no-such-package-1.0.whl"))
    said: list[str] = []
    with pytest.raises(InstallError, match=r"ended with code 1.*log: .*small\.log"):
        environments.install(environment, said.append)
    assert environment.state == "unfinished"
    assert any("pip" in line for line in said)


def test_what_needs_no_environment_says_so() -> None:
    for name, message in (("accelerate", "own environment"), ("petals", "cannot be installed: Petals")):
        with pytest.raises(UsageError, match=message):
            environments.install(environments.environment_of(registry.get(name)), print)


def test_the_command_lists_explains_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIERBENCH_BASELINES", str(tmp_path))
    assert cli.main(["baselines", "list"]) == 0
    shown = capsys.readouterr().out
    for name in registry.NAMES:
        assert f"| {name} " in shown
    assert "cannot be run" in shown and "not installed" in shown and str(tmp_path) in shown
    assert cli.main(["baselines", "explain", "llama-cpp"]) == 0
    assert "load_mode = mmap" in capsys.readouterr().out
    assert cli.main(["baselines", "install"]) == 2
    assert "wants the name of a system" in capsys.readouterr().err
    assert cli.main(["baselines", "remove", "llama-cpp"]) == 0
    assert "there was none" in capsys.readouterr().out
    assert cli.main(["baselines", "path", "openvino"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "openvino")
