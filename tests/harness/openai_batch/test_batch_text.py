"""The text of a batch answer: what the tokenizer decodes after the prompt, special tokens left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from engine.spec.request import Output
from harness.openai_batch.grammar import Grammars
from harness.openai_batch.prompts import PromptReader
from harness.openai_batch.request import Served, read_envelope, read_request
from harness.openai_batch.response import answer_record
from harness.tokenizer import Text
from tests.harness.openai_batch.batch_files import CHAT, TEMPLATE, line
from tests.support.tiny_tokenizers import KINDS


def answered(text: Text, generated: Sequence[int], content: dict[str, Any], reason: Any = "length") -> Any:
    """The only choice of a line's answer, as if the engine had generated these tokens."""
    size = len(text.tokenizer)
    reader = PromptReader(text, size, None)
    served = Served(reader, Grammars(text, size), ["tiny"], seed=0, chat_tokens=20, fingerprint="f")
    request = read_request(read_envelope(json.dumps(content).encode(), "f"), served)
    output = Output(tuple(generated), (-1.0,) * len(generated), None, reason, 1, 0.1)
    (choice,) = answer_record(request, [output], served)["response"]["body"]["choices"]
    return choice


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_what_the_tokenizer_decodes_after_the_prompt(kind: str) -> None:
    text = Text(KINDS[kind]())
    decode = text.tokenizer.decode
    prompt, generated = text.encode("hello play"), text.encode("the world, a run")
    before = (*text.start_ids, *prompt)
    choice = answered(text, generated, line("a", prompt="hello play", max_tokens=20, logprobs=0))
    whole, own = (decode(ids, skip_special_tokens=True) for ids in ((*before, *generated), before))
    assert own + choice["text"] == whole
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["text_offset"][0] == 0


@pytest.mark.parametrize(
    ("more", "shown"),
    [({}, True), ({"skip_special_tokens": True}, True), ({"skip_special_tokens": False}, False)],
)
def test_special_tokens_in_the_middle_are_left_out_unless_they_are_asked_for(
    more: dict[str, Any], shown: bool
) -> None:
    text = Text(KINDS["wordpiece"]())
    (special,) = text.tokenizer.encode("<sep>", add_special_tokens=False)
    generated = (*text.encode("play"), special, *text.encode("the world"))
    choice = answered(text, generated, line("a", prompt="hello", max_tokens=9, logprobs=0, **more))
    assert choice["text"] == (" play the world" if shown else " play <sep> the world")
    assert choice["logprobs"]["tokens"][1].strip() == "<sep>", "a token of the answer all the same"
    assert choice["logprobs"]["text_offset"] == ([0, 5, 5, 9] if shown else [0, 5, 11, 15])
    assert len(choice["logprobs"]["token_logprobs"]) == 4


def test_the_name_of_a_special_token_is_a_stop_string_even_where_it_is_not_shown() -> None:
    text = Text(KINDS["wordpiece"]())
    (special,) = text.tokenizer.encode("<sep>", add_special_tokens=False)
    generated = (*text.encode("play"), special)
    choice = answered(text, generated, line("a", prompt="hello", stop="<sep>"), "stop")
    assert (choice["text"], choice["finish_reason"]) == (" play", "stop")


def test_a_chat_leaves_them_out_too() -> None:
    text = Text(KINDS["byte fallback"]())
    text.tokenizer.chat_template = TEMPLATE
    special = text.tokenizer.convert_tokens_to_ids("<sep>")
    generated = (special, *text.encode("hello é"))
    asked = line("a", CHAT, messages=[{"role": "user", "content": "a"}], logprobs=True)
    choice = answered(text, generated, asked)
    assert choice["message"]["content"] == " hello é"
    assert choice["logprobs"]["content"][0]["token"] == "<sep>"
    assert [one["bytes"] for one in choice["logprobs"]["content"][-2:]] == [[0xC3], [0xA9]]


def test_bytes_that_are_no_text_are_shown_as_the_tokenizer_shows_them() -> None:
    text = Text(KINDS["byte fallback"]())
    half = text.encode("é")[-2:-1]
    ids = (*text.encode("hello"), *half, *half)
    choice = answered(text, ids, line("a", prompt="a", max_tokens=9))
    assert choice["text"] == " hello\ufffd\ufffd"
