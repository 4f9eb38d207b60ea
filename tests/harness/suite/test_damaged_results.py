"""A finished suite whose files were damaged: the same command makes them again, and asks nothing again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import UsageError
from harness.files import HELM_FILES
from harness.report.write import write_report
from harness.suite.options import SuiteOptions
from harness.suite.runner import run_suite
from tests.harness.conftest import OptionsMaker
from tests.harness.files import comparable
from tests.support.counting_engine import CountingEngine

pytest.importorskip("helm.benchmark")

Damage = Callable[[Path], None]


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path: Path) -> None:
    """One digit is another, and the file is JSON as before."""
    data = bytearray(path.read_bytes())
    place = next(
        at for at in range(len(data) - 1, 0, -1) if data[at : at + 1].isdigit() and data[at - 1] != 34
    )
    data[place] = ord("1") if data[place] != ord("1") else ord("2")
    json.loads(bytes(data))
    path.write_bytes(bytes(data))


def removed(path: Path) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def finished(make_options: OptionsMaker, tmp_path_factory: pytest.TempPathFactory) -> SuiteOptions:
    """A suite with answers and all its files."""
    options = make_options(tmp_path_factory.mktemp("finished"), run_entries=["toy_joint"])
    run_suite(options, CountingEngine)
    return options


@pytest.fixture
def suite(finished: SuiteOptions, make_options: OptionsMaker, tmp_path: Path) -> SuiteOptions:
    """A copy of it."""
    shutil.copytree(finished.output_path, tmp_path / "copy")
    return make_options(tmp_path / "copy", run_entries=["toy_joint"])


FILES = [*HELM_FILES, "manifest.json", "trace.json", "table.json", "table.md"]
DAMAGES = [emptied, cut, changed, removed]
CASES = [
    pytest.param(
        name, damage, id=f"{name}-{damage.__name__}", marks=[] if (i + j) % 2 == 0 else pytest.mark.slow
    )
    for i, name in enumerate(FILES)
    for j, damage in enumerate(DAMAGES)
]
"""Each file with two kinds of damage by default, each damage with half of the files; the rest are slow."""


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_the_same_command_mends_every_file(suite: SuiteOptions, name: str, damage: Damage) -> None:
    folder = suite.output_path / "runs" / "toy"
    (path,) = folder.rglob(name)
    if damage is changed and name in ("table.md", "scenario.json"):
        damage = cut  # they have no digits that are figures
    expected, before = comparable(folder), path.read_bytes()
    damage(path)
    if name not in ("table.md", "trace.json") or (name == "trace.json" and damage is not removed):
        with pytest.raises(UsageError, match="run the suite again"):
            write_report(suite.output_path, ["toy"], suite.output_path / "report")
    CountingEngine.calls.clear()
    for _ in range(2):
        run_suite(suite, CountingEngine)
        assert comparable(folder) == expected
    assert CountingEngine.calls == [], "all answers are in the journal"
    assert name in ("manifest.json", "trace.json", "table.json") or path.read_bytes() == before
    write_report(suite.output_path, ["toy"], suite.output_path / "report")


def test_answers_of_damaged_lines_are_asked_again(
    suite: SuiteOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = suite.output_path / "runs" / "toy"
    journal = folder / "policies" / "resident" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    changed_line = lines[0].replace(b'"prompt_tokens":', b'"prompt_tokens":1', 1)
    journal.write_bytes(b"".join([changed_line, *lines[1:]]))
    expected = comparable(folder)
    shutil.rmtree(next(folder.glob("toy_joint*")))
    CountingEngine.calls.clear()
    run_suite(suite, CountingEngine)
    assert CountingEngine.calls == [1] and comparable(folder).keys() == expected.keys()
    assert "1 damaged line is" in capsys.readouterr().err
