"""The journal can be read after it was cut off anywhere, and damage in it never becomes an answer."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import StorageError
from engine.files.whole import CHECKSUM
from engine.spec.request import Output
from harness.files import JsonLines, json_line, read_line
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
    assert "1 damaged line is" in journal.complaint("is asked again") and str(path) in journal.complaint("")


def test_no_changed_bit_becomes_an_answer(tmp_path: Path) -> None:
    path, rng = tmp_path / "journal", random.Random(0)
    fill(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        journal = Journal(path)
        assert journal.answers.items() <= ANSWERS.items() and len(journal.answers) < 3, place
        assert journal.damaged or place == len(whole) - 1, "but for the last line, which looks torn"


@pytest.mark.parametrize("form", [{"separators": (",", ":")}, {"separators": (", ", ": ")}])
def test_a_line_that_was_edited_is_damaged(tmp_path: Path, form: dict[str, Any]) -> None:
    path = tmp_path / "journal"
    fill(path)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    lines[0]["tokens"] = [1, 3]
    del lines[1][CHECKSUM]
    lines[2][CHECKSUM] = "0"
    path.write_text("".join(json.dumps(line, **form) + "\n" for line in lines))
    assert Journal(path).answers == {} and Journal(path).damaged == 3


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [1.0, 2]}, {"tokens": [True, 2]}, {"tokens": [1, -2]}, {"tokens": [1, 10**9]},
        {"tokens": [1]}, {"tokens": None}, {"tokens": "12"}, {"logprobs": []}, {"logprobs": [-0.1, "-0.2"]},
        {"logprobs": [-0.1, 0.5]}, {"logprobs": [-0.1, math.inf]}, {"logprobs": [-0.1, -1]},
        {"prompt_logprobs": [-0.5]}, {"prompt_logprobs": ["a"] * 6}, {"prompt_greedy": [1]},
        {"finish_reason": "tired"}, {"finish_reason": None}, {"block_size": 0}, {"block_size": math.nan},
        {"block_size": math.inf}, {"block_size": "x"}, {"block_seconds": -1.0}, {"block_seconds": math.nan},
        {"prompt_tokens": 0}, {"prompt_tokens": 7.0}, {"key": 5},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_no_answer_has_are_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "journal"
    fill(path)
    entry = read_line(path.read_bytes().splitlines(keepends=True)[0])
    path.write_bytes(json_line(entry))
    assert len(Journal(path, 100).answers) == 1
    path.write_bytes(json_line(entry | change))
    assert Journal(path, 100).answers == {} and Journal(path, 100).damaged == 1


def test_a_log_that_is_removed_while_it_is_written_is_said(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "journal"
    with Journal(path) as journal:
        journal.keep("generated", ANSWERS["generated"])
        shutil.rmtree(path.parent)
        with pytest.raises(StorageError, match="removed while") as caught:
            journal.keep("scored", ANSWERS["scored"])
    assert str(path) in str(caught.value)
    fill(path)
    assert Journal(path).answers == ANSWERS


def test_lines_without_a_checksum_count_where_they_are_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"old":1}\n' + json_line({"new": 2}) + json_line({"new": 3}).replace(b"3", b"4", 1))
    for unchecked, expected in ((True, [{"old": 1}, {"new": 2}]), (False, [{"new": 2}])):
        log, found = JsonLines(path, unchecked=unchecked), list[Any]()
        log.read(found.append)
        assert found == expected and log.damaged == 3 - len(expected)


def test_which_tokens_were_greedy_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    scored = Answer(Output((), (), (-0.5, -1.5), "length", 1, 0.5, prompt_greedy=(True, False)), 3)
    with Journal(path) as journal:
        journal.keep("scored", scored)
    assert Journal(path).answers["scored"] == scored
    entry = read_line(path.read_bytes())
    del entry["prompt_greedy"]
    path.write_bytes(json_line(entry))
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
