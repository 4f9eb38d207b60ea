"""A small part of the campaign, and that the campaign itself sees what it looks for."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import UsageError
from tests.chaos.campaign import Campaign
from tests.chaos.corruption import DAMAGES
from tests.chaos.fuzz import Reader, damaged, faults_of, fuzz
from tests.chaos.kills import kills, signals
from tests.chaos.work import BATCH, CURVE, PACKING, RUN, Command, Ended, equal, names, run, without_times

CASES = 150


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """A campaign whose undisturbed commands all tests here share."""
    return Campaign(tmp_path_factory.mktemp("campaign"), seed=7, ends=0.0)


@pytest.fixture
def campaign(undisturbed: Campaign) -> Campaign:
    """The campaign with counts and time of its own."""
    return replace(undisturbed, ends=time.monotonic() + 240, counts=Counter(), failures=[])


@pytest.mark.parametrize(
    ("commands", "cases", "readers"),
    [((RUN,), CASES, 13), pytest.param((RUN, CURVE, PACKING), 3 * CASES, 15, marks=pytest.mark.slow)],
    ids=["run", "all"],
)
def test_readers_refuse_in_a_line_or_read(
    campaign: Campaign, commands: tuple[Command, ...], cases: int, readers: int
) -> None:
    fuzz(campaign, cases, commands)
    assert campaign.failures == []
    assert sum(campaign.counts.values()) == cases and len(campaign.counts) == readers


def test_a_killed_batch_ends_with_the_same_answers(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.chaos.kills.WEIGHTS", {"batch": 1})
    monkeypatch.setattr("tests.chaos.kills.SIGNALLED", ("batch",))
    kills(campaign, 1)
    signals(campaign, 1)
    assert campaign.failures == [] and sum(campaign.counts.values()) >= 2
    assert not any("before the signal" in kind for _, kind in campaign.counts)


def test_what_was_left_behind_or_differs_is_seen(campaign: Campaign, tmp_path: Path) -> None:
    place = Path(shutil.copytree(campaign.undisturbed(BATCH).folder, tmp_path / "batch"))
    ended = run(BATCH, place)
    assert campaign.same_as_undisturbed(BATCH, place, ended) == []
    (place / "offload" / "run-x").mkdir(parents=True)
    answers = place / "answers.jsonl"
    first, *rest = answers.read_text(encoding="utf-8").splitlines()
    line = json.loads(first)
    line["response"]["body"]["choices"][0]["text"] += "!"
    answers.write_text("\n".join([json.dumps(line), *rest]) + "\n", encoding="utf-8")
    faults = campaign.same_as_undisturbed(BATCH, place, ended)
    assert faults[0] == "its files differ" and "run-x" in faults[1]


def test_outcomes_are_compared_without_times() -> None:
    assert equal({"a": [1.0, 2]}, {"a": [1.0 + 1e-7, 2]})
    assert not equal({"a": [1.0]}, {"a": [1.1]}) and not equal({"a": 1}, {"b": 1})
    assert without_times({"seconds": 3, "text": "x", "stats": [{"name": {"name": "batch_size"}}]}) == {
        "text": "x",
        "stats": [],
    }


@pytest.mark.parametrize(
    ("code", "text", "clean"),
    [
        (0, "done", True),
        (2, "error: a is no b: give c", True),
        (1, "Traceback (most recent call last):\nerror: x", False),
        (1, "error: \x1b[1mx", False),
        (-11, "", False),
        (2, "no line that says why", False),
    ],
)
def test_only_a_line_is_a_clean_refusal(code: int, text: str, clean: bool) -> None:
    assert Ended(code, 1.0, text).clean == clean


def test_damage_changes_content_and_is_repeatable() -> None:
    content = json.dumps({"a": [1, 2, {"b": "c"}]}).encode() * 3
    for damage in DAMAGES.values():
        assert damage(content, random.Random(3)) == damage(content, random.Random(3)) != content
    inputs = {damaged(content, random.Random(number)) for number in range(50)}
    assert len(inputs) > 30 and damaged(content, random.Random(1)) == damaged(content, random.Random(1))


def test_an_uncaught_error_and_a_hang_are_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(content: bytes) -> object:
        raise UsageError("too long: cut it")

    def fails(content: bytes) -> object:
        return json.loads(content)["missing"]

    assert faults_of(Reader("a", b"", refuses), b"{}") == []
    assert faults_of(Reader("a", b"", fails), b"{}")[0].startswith("KeyError")
    monkeypatch.setattr("tests.chaos.fuzz.SECONDS", 1)
    assert "no end" in faults_of(Reader("a", b"", lambda _: time.sleep(5)), b"{}")[0]


def test_names_are_those_of_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("", encoding="utf-8")
    assert names(tmp_path) == {"a", "a/b"}
