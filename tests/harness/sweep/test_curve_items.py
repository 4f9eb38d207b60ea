"""Formats, texts, and requests with forced continuations: windows, last words, correct answers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import PolicyError, UsageError
from engine.spec.format_key import format_key, reference_of
from engine.spec.policy import Policy
from engine.spec.precision import MatmulPrecision
from harness.commands.arguments import read_policies
from harness.commands.curve import FORMATS, PAPER_FORMATS
from harness.commands.run import DEMO_MODEL
from harness.sweep import texts as curve_text
from harness.sweep.formats import choose_formats
from harness.sweep.items import Item, answers, choose_compared, digest, last_words, windows
from harness.tokenizer import Text

BASE = Policy.parse("name=base,weights=0/0.5/0.5,device_batch=3")


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.load(str(DEMO_MODEL))


def decode(text: Text, ids: tuple[int, ...]) -> str:
    return text.join(ids).decode()


def test_windows_score_every_token_after_the_first_prompt_once(text: Text) -> None:
    source = curve_text.read_dataset("demo")
    ids = text.encode(source)
    items = windows(text, source, window=64, stride=16, most_tokens=10**9)
    assert all(
        item.prompt[:1] == text.start_ids and len(item.prompt) + len(item.forced) == 64 for item in items
    )
    scored = tuple(token for item in items for token in item.forced)
    assert scored == ids[47 : 47 + len(scored)] and len(ids) - 47 - len(scored) < 16
    for before, after in itertools.pairwise(items):
        assert after.prompt[-16:] == before.forced


def test_windows_end_at_the_most_tokens(text: Text) -> None:
    source = curve_text.read_dataset("demo")
    assert len(windows(text, source, 64, 32, most_tokens=100)) == 3
    assert len(windows(text, source, 64, 32, most_tokens=1)) == 1


def test_a_text_shorter_than_a_window(text: Text) -> None:
    with pytest.raises(UsageError, match="less than a window of 63: give more text or lower --window"):
        windows(text, "The printer.", 64, 32, 100)
    with pytest.raises(UsageError, match="a stride of 64 tokens leaves no prompt"):
        windows(text, "The printer.", 64, 64, 100)


def test_last_words(text: Text) -> None:
    (item,) = last_words(text, ["Every printer is checked before it is paid \n"], window=512)
    assert decode(text, item.forced) == " paid"
    assert decode(text, item.prompt[1:]) == "Every printer is checked before it is"
    assert item.position == len(item.prompt) - 1


def test_a_long_passage_loses_its_beginning(text: Text) -> None:
    (item,) = last_words(text, ["The printer from Zenith " * 30 + "is paid"], window=32)
    assert len(item.prompt) + len(item.forced) == 32 and item.prompt[:1] == text.start_ids
    assert decode(text, item.prompt[1:]).endswith(" Zenith is")


def state(method: str, prompt: str, tags: list[list[str]], **more: Any) -> dict[str, Any]:
    references = [
        {"output": {"text": t}, "tags": kinds} for t, kinds in zip(["Rome", "Lisbon"], tags, strict=True)
    ]
    asked = {"request": {"prompt": prompt}, "instance": {"references": references}, "train_trial_index": 0}
    adapter = {"method": method, "output_prefix": "Answer: "}
    return {"adapter_spec": adapter, "request_states": [asked | more]}


def run(tmp_path: Path, name: str, *states: dict[str, Any]) -> Path:
    (tmp_path / name).mkdir()
    merged = states[0] | {"request_states": [s for part in states for s in part["request_states"]]}
    (tmp_path / name / "scenario_state.json").write_text(json.dumps(merged))
    return tmp_path / name


RIGHT = [[], ["correct"]]


def test_the_correct_reference_is_the_answer(text: Text, tmp_path: Path) -> None:
    folder = run(tmp_path, "a", state("generation", "City?\nAnswer:", RIGHT))
    (item,) = answers([folder], text, most=10, window=512)
    assert (decode(text, item.prompt[1:]), decode(text, item.forced)) == ("City?\nAnswer:", " Lisbon")
    assert item.prompt[:1] == text.start_ids


def test_a_letter_is_the_answer_where_one_is_chosen(text: Text, tmp_path: Path) -> None:
    mapped = state(
        "multiple_choice_joint", "City?\nAnswer:", RIGHT, output_mapping={"A": "Rome", "B": "Lisbon"}
    )
    (item,) = answers([run(tmp_path, "a", mapped)], text, 10, 512)
    assert decode(text, item.forced) == " B"


def test_of_scored_choices_the_correct_one_is_taken(text: Text, tmp_path: Path) -> None:
    method = "multiple_choice_separate_original"
    both = [state(method, f"City?\nAnswer: {city}", RIGHT) for city in ("Rome", "Lisbon")]
    (item,) = answers([run(tmp_path, "a", *both)], text, 10, 512)
    assert (decode(text, item.prompt[1:]), decode(text, item.forced)) == ("City?\nAnswer:", " Lisbon")


@pytest.mark.parametrize(
    "left_out",
    [
        state("generation", "x", [[], []]),
        state("generation", "x", RIGHT, train_trial_index=1),
        state("language_modeling", "x", RIGHT),
        state("generation", "word " * 600, RIGHT),
    ],
)
def test_what_has_no_answer_is_left_out(text: Text, tmp_path: Path, left_out: dict[str, Any]) -> None:
    assert answers([run(tmp_path, "a", left_out)], text, 10, 512) == []


def test_runs_take_turns(text: Text, tmp_path: Path) -> None:
    first = run(tmp_path, "a", *(state("generation", f"first {i}", RIGHT) for i in range(3)))
    second = run(tmp_path, "b", *(state("generation", f"second {i}", RIGHT) for i in range(3)))
    found = [decode(text, item.prompt[1:]) for item in answers([first, second], text, 2, 512)]
    assert found == ["first 0", "second 0", "first 1", "second 1"]


def test_compared_positions_are_shared_among_the_kinds() -> None:
    items = [Item("answer", (2,), (5,) * 3) for _ in range(10)] + [
        Item("text", (2,), (5,) * 8) for _ in range(4)
    ]
    marked = choose_compared(items, 24)
    counts = {
        kind: sum(len(i.forced) for i in marked if i.kind == kind and i.compared)
        for kind in ("answer", "text")
    }
    assert counts == {"answer": 12, "text": 8}
    assert not any(item.compared for item in choose_compared(items, 0))
    assert digest(marked) != digest(items) == digest(list(items))


def test_every_format_of_our_files_is_one() -> None:
    formats = choose_formats([], read_policies(FORMATS), BASE)
    assert len({format_key(policy) for policy in formats}) == len(formats) == 17
    assert all(policy.weights == BASE.weights and policy.device_batch == 3 for policy in formats)
    names = [policy.name for policy in choose_formats([], read_policies(PAPER_FORMATS), BASE)]
    assert names == ["4-bit", "4-bit-sparse"]


def test_the_reference_compresses_nothing() -> None:
    policy = reference_of(Policy.parse("weight_quant=4,kv_quant=4,attention_fraction=0.5,kv=host"))
    assert policy == Policy(name="full", kv=policy.kv)


def test_how_products_are_rounded_is_part_of_a_format() -> None:
    (coarse,) = choose_formats(["name=coarse,matmul_precision=medium"], {}, BASE)
    assert coarse.matmul_precision is MatmulPrecision.MEDIUM
    assert format_key(coarse) != format_key(reference_of(BASE))
    everywhere = Policy.parse("matmul_precision=medium,weights=disk")
    assert reference_of(everywhere).matmul_precision is MatmulPrecision.HIGHEST
    (four,) = choose_formats(["weight_quant=4"], {}, everywhere)
    assert four.matmul_precision is MatmulPrecision.MEDIUM, "a format that says nothing leaves the base's"


def test_formats_are_chosen_changed_and_written_out() -> None:
    known = read_policies(FORMATS)
    one, two, three = choose_formats(["w4", "w4,kv_quant=4", "name=mine,kv_quant=kivi2", "full"], known, BASE)
    assert (one.name, two.name, three.name) == ("w4", "w4,kv_quant=4", "mine")
    assert two.weight_quant == one.weight_quant and str(two.kv_quant) == "4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kv4-kiwi"], "no format is called 'kv4-kiwi' .did you mean 'kv4-kivi'"),
        (["name=x,kv=disk"], "format 'x' sets more than weight_quant"),
        (["w4", "name=W4!,kv_quant=4", "name=w4,kv_quant=8"], "two formats are called"),
        (["name=full,kv_quant=4"], "two formats are called 'full'"),
        (["kv_quant=5"], "5 bits are not available"),
    ],
)
def test_formats_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        choose_formats(words, read_policies(FORMATS), BASE)


def test_texts_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UsageError, match=r"empty\.txt is empty"):
        curve_text.read_text(tmp_path / "empty.txt")
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        curve_text.read_text(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(UsageError, match="is not UTF-8"):
        curve_text.read_text(tmp_path / "latin.txt")
    with pytest.raises(UsageError, match=r"data set '.*nothing' cannot be loaded"):
        curve_text.read_dataset(str(tmp_path / "nothing"))


def test_passages(tmp_path: Path) -> None:
    path = tmp_path / "passages.jsonl"
    path.write_text('{"text": "one two"}\n\n{"text": "three four"}\n')
    assert curve_text.read_last_words(str(path)) == ["one two", "three four"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no passages"),
        ("text", r'line 1: not an object \{"text"'),
        ('{"text": "a b"}\n{"words": "a b"}', "line 2: not an object"),
        ('{"text": "one"}', "passage 1: 'one' has no last word"),
    ],
)
def test_passages_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "passages.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        curve_text.read_last_words(str(path))


def test_the_demos_text_is_always_the_same() -> None:
    assert curve_text.read_dataset("demo") == curve_text.read_dataset("demo")
