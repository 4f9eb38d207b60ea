"""``run_helm.py store``: entries are shown, checked and removed, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cli import main
from tests.support.engine_runs import files_below
from tests.support.store_entries import KEY, flip, make


def run(*arguments: str | Path) -> int:
    return main(["store", *map(str, arguments)])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of one entry."""
    make(tmp_path / "store").close()
    return tmp_path / "store"


def test_entries_are_shown(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--store", store) == 0
    output = capsys.readouterr().out
    assert output.startswith("| key          | model     | weights | kept at |")
    assert f"| {KEY[:12]} | org/model | trained | 4       | 20" in output
    assert "12.0 MiB |" in output and f"1 entry, 12.0 MiB, in {store}" in output
    with make(store):
        assert run("list", "--store", store) == 0
    assert "| in use |" in capsys.readouterr().out


def test_where_it_is_and_that_it_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIERBENCH_STORE", str(tmp_path / "mine"))
    assert run("path") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'mine'}\n"
    assert run("list") == run("remove", "--all") == run("verify", "--all") == 0
    assert f"{tmp_path / 'mine'} is empty" in capsys.readouterr().out
    assert files_below(tmp_path) == []


def test_checksums_are_compared(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", KEY[:4], "--store", store) == 0
    assert f"{KEY[:12]} is as it was written (12.0 MiB)" in capsys.readouterr().out
    with make(store) as entry:
        flip(entry.path, entry.extent("head").offset)
    assert run("verify", "--all", "--store", store) == 1
    output = capsys.readouterr().out
    assert "is damaged: tensor 'head'" in output and "1 damaged in" in output


def test_damage_is_shown_and_removed(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / KEY / "index.json").write_text("{}")
    assert run("list", "--store", store) == 0
    output = capsys.readouterr().out
    assert "| damaged |" in output and f"run_helm.py store remove {KEY}" in output
    assert run("verify", KEY, "--store", store) == 1
    assert run("remove", KEY, "--store", store) == 0
    assert files_below(store) == []


def test_what_is_used_stays(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make(store):
        assert run("remove", "--all", "--store", store) == 1
        assert f"{KEY[:12]} is in use" in capsys.readouterr().out
    assert run("remove", KEY[:6], "--store", store) == 0
    assert "removed 1 entry, 12.0 MiB, from" in capsys.readouterr().out
    assert files_below(store) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", KEY], "takes neither keys nor --all"), (["path", "--all"], "takes neither"),
        (["remove"], "wants keys"), (["verify"], "wants keys"), (["remove", KEY, "--all"], "or --all"),
        (["remove", "f" * 12], "begins 0 keys"), (["verify", ""], "begins 1 keys"),
        (["clear"], "invalid choice"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], words: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--store", store) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and len(files_below(store)) == 3


def test_a_folder_in_a_file_of_settings(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = store.parent / "settings.yaml"
    settings.write_text(f"store: {store}\n")
    assert run("list", "--config", settings) == 0
    assert KEY[:12] in capsys.readouterr().out
    assert run("remove", KEY, "--config", settings) == 0
    assert files_below(store) == []
