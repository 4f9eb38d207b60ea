"""What the documents say can be done can be done, and what they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from engine.spec.policy import Policy
from harness.cli import build_parser, main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/life_of_a_request.md",
    "docs/compression.md",
    "docs/curve.md",
    "docs/profile.md",
    "docs/store.md",
    "docs/throughput.md",
    "results/README.md",
)


def commands(document: str) -> list[list[str]]:
    """The arguments of every whole run_helm.py command in a document."""
    text = (ROOT / document).read_text().replace("\\\n", " ")
    found = re.findall(r"(?:^|`)(?:\.venv/bin/)?python run_helm\.py ?([^`\n]*)", text, re.MULTILINE)
    return [shlex.split(arguments, comments=True) for arguments in found if "..." not in arguments]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    paths = re.findall(r"`((?:engine|harness|scenarios|tests|docs)/[\w./*-]+)`", text)
    for path in {*links, *paths} - {"scenarios/sentiment.py"}:
        at = (ROOT / document).parent if path in links else ROOT
        assert (at / path).exists(), f"{document} names {path}"


def test_tree_of_the_readme_exists() -> None:
    tree = (ROOT / "README.md").read_text().split("## What is where")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        indent = len(line) - len(line.lstrip())
        if indent > 4:
            continue  # the rest of a description
        names = re.split(r"\s{2,}| (?=[a-z]+ )", line.strip())[0].split(", ")
        base = ROOT if indent == 0 else folder
        for name in names:
            assert list(base.glob(name.rstrip("/"))), f"the README's tree names {base / name}"
        if indent == 0 and names[0].endswith("/"):
            folder = ROOT / names[0]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_understood(document: str) -> None:
    for arguments in commands(document):
        args = build_parser().parse_args(arguments or ["run"])
        given = getattr(args, "policy", [])
        for policy in [given] if isinstance(given, str) else given:
            if "=" in policy:
                Policy.parse(policy)


def test_readme_has_commands_to_try() -> None:
    assert len(commands("README.md")) >= 4


def test_scenario_of_the_contributing_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = re.search(
        r"```python\n# scenarios/sentiment\.py\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    )
    assert block is not None
    plugin = tmp_path / "sentiment.py"
    plugin.write_text(block[1])
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--plugins", str(plugin), "--run-entries", "sentiment", "-m", "3", "--dry-run"]
    assert main([*arguments, "--policy", "resident", "-o", str(tmp_path / "results")]) == 0
    assert "sentiment: 3, 3," in capsys.readouterr().out
