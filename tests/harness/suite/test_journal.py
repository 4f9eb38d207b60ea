"""The journal can be read after it was cut off anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import StorageError
from engine.spec.request import Output
from harness.suite.journal import Answer, Journal

ANSWERS = {
    "generated": Answer(Output((1, 2), (-0.1, -0.25), None, "stop", 12.5, 1.25), 7),
    "scored": Answer(Output((), (), (-1.0, -2.5, float("-inf")), "length", 1, 0.5), 4),
    "ended": Answer(Output((9, 2), (-3.0000000000000004, -1e-9), (-0.5,), "eos", 3, 0.1), 2),
}


def fill(path: Path) -> None:
    with Journal(path) as journal:
        for key, answer in ANSWERS.items():
            journal.keep(key, answer)


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    fill(tmp_path / "deep" / "journal.jsonl")
    assert Journal(tmp_path / "deep" / "journal.jsonl").answers == ANSWERS


def test_every_place_to_be_cut_off_loses_the_last_answer_at_most(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        path = tmp_path / "torn"
        path.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n")
        with Journal(path) as journal:
            assert list(journal.answers) == list(ANSWERS)[:complete]
            assert journal.damaged == 0
            for key in list(ANSWERS)[complete:]:
                journal.keep(key, ANSWERS[key])
        assert path.read_bytes() == whole


def test_damage_in_the_middle_is_counted_and_costs_one_answer(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"key": "scored"}\n' + lines[2])
    journal = Journal(path)
    assert list(journal.answers) == ["generated", "ended"] and journal.damaged == 1


def test_which_tokens_were_greedy_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    scored = Answer(Output((), (), (-0.5, -1.5), "length", 1, 0.5, prompt_greedy=(True, False)), 3)
    with Journal(path) as journal:
        journal.keep("scored", scored)
    assert Journal(path).answers["scored"] == scored
    path.write_bytes(path.read_bytes().replace(b',"prompt_greedy":[1,0]', b""))
    assert Journal(path).answers == {} and Journal(path).damaged == 1


def test_a_later_line_replaces_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    fill(path)
    with Journal(path) as journal:
        journal.keep("scored", ANSWERS["generated"])
    assert Journal(path).answers["scored"] == ANSWERS["generated"]


def test_nothing_is_written_until_there_is_an_answer(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal"):
        pass
    assert not (tmp_path / "journal").exists()


def test_a_file_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        Journal(tmp_path / "file" / "journal").keep("generated", ANSWERS["generated"])


def test_seconds_are_the_share_of_the_passes() -> None:
    assert ANSWERS["generated"].seconds == pytest.approx(0.1)
