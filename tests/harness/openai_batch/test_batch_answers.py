"""What an answer holds beside its text: most probable tokens, ends, grammars; and lines far too long."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.spec.request import Output
from harness.openai_batch import prompts
from harness.openai_batch.fields import LineError
from harness.openai_batch.grammar import Grammars, _Follower
from harness.openai_batch.prompts import PromptReader
from harness.openai_batch.request import read_envelope
from harness.tokenizer import Text, generated_pieces, shown
from tests.harness.openai_batch.batch_files import (
    CHAT,
    body,
    failed,
    line,
    message,
    records,
    run,
    table,
    write,
)

PROMPT = "Question: Is 24 even or odd?"


def answered(
    model: Path, tmp_path: Path, *lines: dict[str, Any], more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The bodies of the answers to some lines, by custom id."""
    tmp_path.mkdir(exist_ok=True)
    assert run(model, write(tmp_path / "in", lines), tmp_path / "out", *more) == 0
    return {str(name): body(record) for name, record in records(tmp_path / "out").items()}


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_completions_list_the_most_probable_tokens(
    model: Path, reference: Any, tmp_path: Path, temperature: float
) -> None:
    text = Text.load(str(model))
    asked = {"max_tokens": 6, "temperature": temperature, "seed": 3, "ignore_eos": True}
    found = answered(
        model, tmp_path, *(line(f"{count}", logprobs=count, **asked) for count in (0, 1, 20)),
        line("echo", logprobs=3, echo=True, **asked), line("scored", logprobs=2, echo=True, max_tokens=0),
        line("ids", logprobs=2, echo=True, max_tokens=0, prompt=list(text.encode(PROMPT))),
    )  # fmt: skip
    prompt = [*text.start_ids, *text.encode(PROMPT)]
    for name, count in (("0", 0), ("1", 1), ("20", 20), ("echo", 3), ("scored", 2), ("ids", 2)):
        (choice,) = found[name]["choices"]
        logprobs = choice["logprobs"]
        assert len({len(listed) for listed in logprobs.values()}) == 1
        assert choice["text"] == "".join(logprobs["tokens"]) or "bytes:" in "".join(logprobs["tokens"])
        begin = 1 if name in ("echo", "scored", "ids") else len(prompt)
        ids = prompt[:begin]
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            row = table(reference, ids)[-1]
            (own,) = [i for i in range(len(row)) if shown(text.token_bytes(i)) == token][:1]
            if name == "ids" and token == logprobs["tokens"][0] and len(ids) == 1:
                assert logprob is None and top is None, "nothing comes before the first id"
                ids = [own]
                continue
            values, places = row.topk(max(count, 1))
            best = {
                shown(text.token_bytes(int(place))): float(v) for place, v in zip(places, values, strict=True)
            }
            expected = (best if count else {}) | {token: float(row[own])}
            assert logprob == pytest.approx(float(row[own]), abs=1e-4)
            assert top == pytest.approx(expected, abs=1e-4) and count <= len(top) <= count + 1
            ids = [*ids, own]


def test_chats_list_the_most_probable_tokens(model: Path, reference: Any, tmp_path: Path) -> None:
    text, messages = Text.load(str(model)), [{"role": "user", "content": "water"}]
    asked = {"messages": messages, "max_tokens": 5, "ignore_eos": True, "temperature": 1, "seed": 1}
    found = answered(
        model, tmp_path, line("none", CHAT, **asked), line("plain", CHAT, logprobs=True, **asked),
        line("five", CHAT, logprobs=True, top_logprobs=5, prompt_logprobs=2, **asked),
    )  # fmt: skip
    assert found["none"]["choices"][0]["logprobs"] is None
    plain, five = (found[name]["choices"][0]["logprobs"] for name in ("plain", "five"))
    assert [one | {"top_logprobs": []} for one in five["content"]] == plain["content"]
    ids = list(text.encode("user: water\nassistant:"))
    listed = found["five"]["prompt_logprobs"]
    assert listed[0] is None and len(listed) == len(ids)
    for place, entries in enumerate(listed[1:]):
        row = table(reference, ids[: place + 1])[-1]
        own, best = ids[place + 1], row.topk(2).indices.tolist()
        assert set(entries) == {str(one) for one in (own, *best)} and next(iter(entries)) == str(own)
        for token, entry in entries.items():
            assert entry["logprob"] == pytest.approx(float(row[int(token)]), abs=1e-4)
            assert entry["rank"] == 1 + int((row > row[int(token)] + 1e-5).sum())
            assert entry["decoded_token"] == text.token_bytes(int(token)).decode(errors="replace")
    for one in five["content"]:
        row = table(reference, ids)[-1]
        assert [top["logprob"] for top in one["top_logprobs"]] == pytest.approx(
            row.topk(5).values.tolist(), abs=1e-4
        )
        assert all(set(top) == {"token", "logprob", "bytes"} for top in one["top_logprobs"])
        assert bytes(one["bytes"]).decode(errors="replace") == one["token"] or "bytes:" in one["token"]
        ids.append(next(i for i in range(len(row)) if list(text.token_bytes(i)) == one["bytes"]))


def test_prompt_logprobs_of_a_completion_hold_its_prefix(model: Path, tmp_path: Path) -> None:
    text = Text.load(str(model))
    found = answered(
        model, tmp_path, line("a", prompt_logprobs=0, prompt="water boils"),
        line("b", prompt="water boils", echo=True, logprobs=0, max_tokens=0),
    )  # fmt: skip
    (choice,), (echoed,) = found["a"]["choices"], found["b"]["choices"]
    assert "prompt_logprobs" not in echoed and choice["logprobs"] is None
    ids = text.encode("water boils")
    first, *others = choice["prompt_logprobs"]
    assert first is None and [list(one) for one in others] == [[str(token)] for token in ids]
    assert [one[str(token)]["logprob"] for one, token in zip(others, ids, strict=True)] == pytest.approx(
        echoed["logprobs"]["token_logprobs"], abs=1e-5
    )


def test_ends_are_where_the_fields_say(model: Path, tmp_path: Path) -> None:
    text = Text.load(str(model))
    free = line("free", max_tokens=24, ignore_eos=True, temperature=1, seed=5, logprobs=0)
    whole = answered(model, tmp_path, free)["free"]["choices"][0]
    pieces = whole["logprobs"]["tokens"]
    assert len(pieces) == 24 and whole["finish_reason"] == "length"
    place = next(i for i in range(4, 24) if pieces[i] not in pieces[:i] and "bytes:" not in pieces[i])
    (end,) = [i for i in range(384) if shown(text.token_bytes(i)) == pieces[place]][:1]
    asked = free["body"] | {"stop_token_ids": [end], "prompt": PROMPT}
    stop = {"stop": pieces[place], "ignore_eos": True}
    found = answered(
        model, tmp_path / "ends", line("id", **asked),
        line("bias", **asked | {"logit_bias": {f"{end}": -100}}),
        line("text", **free["body"] | stop), line("late", **free["body"] | stop | {"min_tokens": place + 1}),
    )  # fmt: skip
    by_id, by_text = found["id"]["choices"][0], found["text"]["choices"][0]
    assert by_id["finish_reason"] == by_text["finish_reason"] == "stop"
    assert by_id["logprobs"]["tokens"] == by_text["logprobs"]["tokens"] == pieces[:place]
    assert found["id"]["usage"]["completion_tokens"] == place + 1
    assert pieces[place] not in found["bias"]["choices"][0]["logprobs"]["tokens"]
    late = found["late"]["choices"][0]
    assert late["logprobs"]["tokens"][: place + 1] == pieces[: place + 1]


def test_a_stop_string_counts_behind_min_tokens(model: Path) -> None:
    text = Text.load(str(model))
    ids = text.encode("one two one two one")
    output = Output(ids, (0.0,) * len(ids), None, "stop", 1, 1)
    for count in range(len(ids)):
        kept = b"".join(data for data, _ in generated_pieces(output, ["two"], text, count))
        before = len(text.join(ids[:count]))
        ends = [match.start() for match in re.finditer(b"two", text.join(ids)) if match.end() > before]
        assert len(kept) == (ends[0] if ends else len(text.join(ids)))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize("policy", ["resident", "offloaded,device_batch=3"])
def test_answers_follow_a_schema(model: Path, tmp_path: Path, policy: str) -> None:
    messages = [{"role": "user", "content": "who?"}]
    asked = {"max_tokens": 90, "response_format": FORMAT}
    lines = [
        *(
            line(f"{i}", temperature=i % 2 * 1.5, seed=i, prompt="who? " * i, n=1 + i % 3, **asked)
            for i in range(1, 6)
        ),
        line("chat", CHAT, messages=messages, logprobs=True, min_tokens=3, repetition_penalty=1.2, **asked),
        line("free", prompt="who?", max_tokens=30),
    ]  # fmt: skip
    more = ("--policy", policy, "--offload-dir", str(tmp_path / "off"))
    found = answered(model, tmp_path, *lines, more=more)
    found.pop("free")
    for name, answer in found.items():
        for choice in answer["choices"]:
            content = choice["message"]["content"] if name == "chat" else choice["text"]
            person = json.loads(content)
            assert list(person) == ["name", "age", "tags"] and choice["finish_reason"] == "stop"
            assert len(person["name"]) <= 4 and 0 <= person["age"] <= 99
            assert set(person["tags"]) <= {"a", "b"} and len(person["tags"]) <= 2
            assert "\n" not in content


def test_any_json_object(model: Path, tmp_path: Path) -> None:
    asked = {"max_tokens": 60, "response_format": {"type": "json_object"}, "temperature": 1}
    found = answered(model, tmp_path, *(line(f"{i}", seed=i, **asked) for i in range(6)))
    for answer in found.values():
        (choice,) = answer["choices"]
        assert choice["text"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "nothing"}, "the schema cannot be followed"),
        ({"$ref": "https://example.com/schema"}, "the schema cannot be followed"),
        ({"not": {"type": "string"}}, "the schema cannot be followed"),
        ({"description": "x" * (1 << 20)}, "more than 1,048,576 bytes"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(
    model: Path, schema: dict[str, Any], reason: str
) -> None:
    grammars = Grammars(Text.load(str(model)), 384)
    with pytest.raises(LineError, match=reason):
        grammars.read({"type": "json_schema", "json_schema": {"schema": schema}})


def test_without_the_library_a_grammar_is_refused_with_the_cure(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(Text.load(str(model)), 384)
    assert grammars.read({"type": "text"}) is None
    with pytest.raises(LineError, match="pip install 'llguidance"):
        grammars.read({"type": "json_object"})


def test_a_grammar_that_gives_up_makes_an_error_record(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        _Follower, "accept", lambda self, token: setattr(self._grammar, "problem", "too deep")
    )
    lines = [line("json", response_format={"type": "json_object"}), line("free")]
    assert run(model, write(tmp_path / "in", lines), tmp_path / "out") == 0
    found = records(tmp_path / "out")
    assert body(found["free"]) and "followed to the end (too deep)" in message(found["json"])
    assert found["json"]["response"]["status_code"] == 500
    assert found["json"]["response"]["body"]["error"]["type"] == "server_error"


def test_created_is_the_time_unless_answers_are_to_be_reproducible(model: Path, tmp_path: Path) -> None:
    before = int(time.time())
    lines = [line(f"{i}", prompt=[*range(5, 65), i]) for i in range(5, 9)]
    for answer in answered(model, tmp_path, *lines).values():
        assert before <= answer["created"] <= time.time()
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 60}
    for answer in answered(model, tmp_path / "same", *lines, more=("--reproducible",)).values():
        assert answer["created"] == 0 and "prompt_tokens_details" not in answer["usage"]


def test_the_rate_is_the_tokens_by_the_time(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line(f"{i}", max_tokens=8, ignore_eos=True) for i in range(6)]
    found = answered(model, tmp_path, *lines)
    last = capsys.readouterr().err.splitlines()[-1]
    shown_tokens, rate = re.search(r", ([\d,]+) tokens, ([\d,.]+) token/s", last).groups()  # type: ignore[union-attr]
    seconds = re.search(r"in ([\d.]+) (ms|s):", last)
    assert seconds is not None
    tokens = sum(answer["usage"]["total_tokens"] for answer in found.values())
    assert int(shown_tokens.replace(",", "")) == tokens
    wall = float(seconds[1]) * (1e-3 if seconds[2] == "ms" else 1)
    assert float(rate.replace(",", "")) == pytest.approx(tokens / wall, rel=0.06)


def test_prompts_far_too_long_are_refused_unread(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text.load(str(model))
    reader, encoded = PromptReader(text, 384, 256), []
    plain = Text.encode
    monkeypatch.setattr(Text, "encode", lambda self, one: (encoded.append(len(one)), plain(self, one))[1])
    most = 257 * text.longest_token
    long = "a " * most * 5
    spoken = {"chat_template_kwargs": {}, "add_generation_prompt": True, "continue_final_message": False}
    for asked in (
        lambda: reader.prompts(long),
        lambda: reader.prompts(["a", long]),
        lambda: reader.conversation([{"role": "user", "content": long}], spoken),
        lambda: reader.prompts([5] * 258),
    ):
        with pytest.raises(LineError, match="window is 256 tokens and the prompt has at least") as caught:
            asked()
        assert caught.value.code == "context_length_exceeded" and sum(encoded) <= 1
        encoded.clear()
    # a tokenizer that may make less of a text, and a window so large that its bytes say little
    monkeypatch.setattr(prompts, "_ENCODED_AT_ONCE", 1000)
    monkeypatch.setattr(prompts, "least_bytes", lambda one: 0)
    with pytest.raises(LineError, match="the prompt has at least"):
        reader.prompts(long)
    assert max(encoded) == 1000 and sum(encoded) <= 4000
    with pytest.raises(LineError, match="more than 2,097,152 tokens"):
        PromptReader(text, 384, None).prompts([[5] * 1_100_000] * 2)
    with pytest.raises(LineError, match="more than 4,194,304 values"):
        read_envelope(b'{"custom_id": "a", "body": {"prompt": [' + b"[]," * 5_000_000 + b"[]]}}", "")


def test_what_least_bytes_says_is_never_more_than_the_tokens(model: Path) -> None:
    text = Text.load(str(model))
    for source in ("plain", " \n\t spaces   ", "Grüße \u0301e", "\u1100\u1161\u11a8" * 9, "a" * 900):
        assert prompts.least_bytes(source) <= len(text.encode(source)) * text.longest_token


def test_errors_are_in_the_body_and_are_tried_again(model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [line("a", min_p=2), line("b", model="other")])
    assert run(model, source, tmp_path / "out") == 0
    found = records(tmp_path / "out")
    assert all(map(failed, found.values()))
    wrong, other = (found[name]["response"] for name in "ab")
    assert wrong["status_code"] == 400 and other["status_code"] == 404
    assert wrong["body"]["error"]["param"] == "min_p" and other["body"]["error"]["code"] == "model_not_found"
    assert run(model, write(tmp_path / "in", [line("a", min_p=0.2), line("b")]), tmp_path / "out") == 0
    assert not any(map(failed, records(tmp_path / "out").values()))
