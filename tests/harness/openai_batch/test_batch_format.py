"""A line of a batch file is answered as it asks, or refused with one line that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.spec.request import NO_RULES, LogitRules
from harness.openai_batch.fields import FIELDS, NEUTRAL, WITHOUT_EFFECT, LineError
from harness.openai_batch.grammar import Grammars
from harness.openai_batch.prompts import PromptReader
from harness.openai_batch.request import BatchRequest, Served, read_envelope, read_request
from harness.tokenizer import Text
from tests.harness.openai_batch.batch_files import CHAT, TEMPLATE, line


@pytest.fixture(scope="module")
def served(tiny_opt_dir: Path) -> Served:
    text = Text.load(str(tiny_opt_dir))
    text.tokenizer.chat_template = TEMPLATE
    reader, names = PromptReader(text, 384, 256), ["tiny", "other"]
    return Served(reader, Grammars(text, 384), names, seed=0, chat_tokens=20, fingerprint="f")


def read(served: Served, content: dict[str, Any] | bytes) -> BatchRequest:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_request(read_envelope(data, served.fingerprint), served)


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return line("a", CHAT, messages=list(messages), **more)


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested deeper"),
        (b"[]", "not a JSON object"),
        (b'{"method": "POST"}', "custom_id is missing"),
        (line("a") | {"custom_id": 7}, "custom_id is missing"),
        (line("a") | {"method": "GET"}, "method 'GET'"),
        (line("a") | {"method": None}, "method is missing"),
        (line("a") | {"url": "/v1/embeddings"}, "url '/v1/embeddings'"),
        (line("a") | {"body": {}}, "body is missing"),
        (line("a") | {"body": "text"}, "body is missing"),
        (line("a", prompt=None), "prompt is missing"),
        (line("a", prompt=[]), "prompt must be"),
        (line("a", prompt={"text": "x"}), "prompt must be"),
        (line("a", prompt=["x", 3]), "prompt must be"),
        (line("a", prompt=[[1, "x"]]), "prompt must be"),
        (line("a", prompt=[[]]), "prompt must be"),
        (line("a", prompt=[True]), "prompt must be"),
        (line("a", prompt=[1, 384]), "token id 384, the model knows 0 to 383"),
        (line("a", prompt="\ud800"), "surrogate"),
        (line("a", prompt="x " * 400), "window is 256 tokens"),
        (line("a", max_tokens=300), "300 to generate do not fit"),
        (line("a", max_tokens=0), "needs echo"),
        (line("a", max_tokens=-1), "max_tokens=-1 must be at least 0"),
        (line("a", max_tokens=2.5), "max_tokens=2.5 must be a whole number"),
        (line("a", max_tokens=True), "must be a whole number"),
        (line("a", temperature=2.5), "temperature=2.5 must be 0 to 2"),
        (line("a", temperature=float("nan")), "temperature=nan must be a number"),
        (line("a", temperature="hot"), "must be a number"),
        (line("a", top_p=0), "top_p=0 must be above 0"),
        (line("a", n=0), "n=0 must be 1 to 128"),
        (line("a", n=10**9), "must be 1 to 128"),
        (line("a", stop=""), "stop string is empty"),
        (line("a", stop=[1]), "stop=[1] must be a text or texts"),
        (line("a", stop="\udc00"), "surrogate"),
        (line("a", echo="yes"), "must be true or false"),
        (line("a", logprobs=21), "logprobs=21 must be 0 to 20"),
        (line("a", logprobs=True), "logprobs=True must be a whole number"),
        (line("a", prompt_logprobs=-1), "prompt_logprobs=-1 must be 0 to 20"),
        (line("a", min_p=1.5), "min_p=1.5 must be 0 to 1"),
        (line("a", min_p=float("inf")), "must be a number"),
        (line("a", repetition_penalty=0), "repetition_penalty=0 must be above 0"),
        (line("a", frequency_penalty=-3), "must be -2 to 2"),
        (line("a", presence_penalty="much"), "must be a number"),
        (line("a", logit_bias={"5": 101}), "logit_bias={'5': 101} must be token ids with numbers"),
        (line("a", logit_bias={"five": 1}), "must be token ids with numbers"),
        (line("a", logit_bias={"384": 1}), "logit_bias=384 is no token id of the model: give"),
        (line("a", stop_token_ids=[-1]), "stop_token_ids=-1 is no token id"),
        (line("a", stop_token_ids=[True]), "must be a list of token ids"),
        (line("a", min_tokens=5), "min_tokens=5 is more than the 4 tokens to generate"),
        (line("a", ignore_eos=1), "ignore_eos=1 must be true or false"),
        (line("a", response_format="json"), "must be a JSON object"),
        (line("a", response_format={"type": "xml"}), "type 'xml' is not available"),
        (line("a", response_format={"type": "json_schema"}), "json_schema.schema is missing"),
        (line("a", prompt=["x"] * 2049), "2,049 prompts, more than 2,048"),
        (line("a", prompt=["x"] * 100, n=128), "100 prompts with n=128 are 12,800 answers, more than 8,192"),
        (line("a", prompt=[5] * 300), "window is 256 tokens and the prompt has at least 300"),
        (line("a", chat_template_kwargs={}), "field 'chat_template_kwargs' of the body is not supported"),
        (line("a", stream=True), "stream=True is not available"),
        (line("a", best_of=3), "best_of=3 is not available"),
        (line("a", skip_special_tokens="no"), "must be true or false"),
        (line("a", use_beam_search=True), "not available"),
        (line("a", max_token=3), "did you mean 'max_tokens'"),
        (line("a", model="gpt-4"), "model 'gpt-4' is not the one that answers, 'tiny'"),
        (line("a", CHAT), "messages is missing"),
        (chat(), "messages is missing or empty"),
        (chat("hi"), "messages[0] has no role"),
        (chat(USER, {"role": "user"}), "messages[1].content is not a text"),
        (chat(USER | {"tool_calls": [{}]}), "messages[0].tool_calls is not available"),
        (chat(USER | {"content": [{"type": "image_url"}]}), "parts that are not text"),
        (chat({"role": "refused", "content": ""}), "roles must alternate"),
        (chat(USER, top_logprobs=3), "top_logprobs=3 needs logprobs=true"),
        (chat(USER, top_logprobs=21, logprobs=True), "top_logprobs=21 must be 0 to 20"),
        (chat(USER, logprobs=3), "must be true or false"),
        (chat(USER, echo=True), "echo=True is not available"),
        (chat(USER, chat_template_kwargs={"tokenize": True}), "chat_template_kwargs.tokenize is not for"),
        (chat(USER, chat_template_kwargs={"messages": []}), "chat_template_kwargs.messages is not for"),
        (chat(USER, chat_template_kwargs={"self": 1}), "chat_template_kwargs.self is not for"),
        (chat(USER, chat_template_kwargs={"add_generation_prompt": False}), "is a field of its own"),
        (chat(USER, continue_final_message=True), "needs add_generation_prompt=false"),
        (chat(USER, tools=[{"type": "function"}]), "tools="),
        (chat(USER, prompt="x"), "field 'prompt' of the body is not supported"),
        (chat({"role": "user", "content": "x " * 400}), "window is 256 tokens"),
    ],
)  # fmt: skip
def test_refused_with_one_line(served: Served, content: dict[str, Any] | bytes, reason: str) -> None:
    with pytest.raises(LineError) as caught:
        read(served, content)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.status in (400, 404)
    has_id = isinstance(content, dict) and content["custom_id"] == "a"
    assert caught.value.custom_id == ("a" if has_id else None)


def test_fields_that_ask_for_nothing_are_taken(served: Served) -> None:
    neutral = {
        "stream": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1,
        "suffix": None, "user": "me", "metadata": {"k": "v"}, "model": "other", "seed": None,
    }  # fmt: skip
    plain = read(served, line("a", seed=1)).requests
    assert read(served, line("a", **neutral | {"seed": 1})).requests == plain
    own = {field.name: field.default for field in FIELDS if field.completions and field.default is not None}
    others = {name: values[0] for name, values in NEUTRAL.items() if values}
    anything = dict.fromkeys(WITHOUT_EFFECT, 7)
    given = {**own, **others, **anything, "seed": 1, "max_tokens": 4, "temperature": 0}
    assert read(served, line("a", **given)).requests == plain
    spoken = {field.name: field.default for field in FIELDS if field.chat and field.default is not None}
    given = {**others, **anything, **spoken, "seed": 1, "add_special_tokens": False, "echo": False}
    assert (
        read(served, chat(USER, **given)).requests == read(served, chat(USER, seed=1, temperature=1)).requests
    )


def test_every_kind_of_prompt(served: Served) -> None:
    text = served.prompts.text
    ids = list(text.encode("water boils"))
    for prompt, computed in (
        ("water boils", [(2, *ids)]),
        ("</s>water boils", [(2, *ids)]),
        ("", [(2,)]),
        (["water boils", "when?"], [(2, *ids), (2, *text.encode("when?"))]),
        (ids, [tuple(ids)]),
        ([ids, [5]], [tuple(ids), (5,)]),
    ):
        request = read(served, line("a", prompt=prompt, n=2))
        assert [one.prompt for one in request.requests] == [one for one in computed for _ in range(2)]


def test_sampling_is_passed_on(served: Served) -> None:
    asked = line("a", temperature=0.5, top_p=0.9, top_k=7, stop=["b", "a"], max_tokens=9)
    (request,) = read(served, asked).requests
    assert read(served, asked).stops == ("a", "b") and read(served, line("a", stop="ba")).stops == ("ba",)
    assert (request.temperature, request.top_p, request.top_k, request.max_new_tokens) == (0.5, 0.9, 7, 9)
    assert request.stop is not None and request.stop_token_ids == {2} and not request.prompt_logprobs
    (default,) = read(served, {**line("a"), "body": {"prompt": "x"}}).requests
    assert (default.temperature, default.top_p, default.top_k, default.max_new_tokens) == (1, 1, 0, 16)
    assert default.rules == NO_RULES and not default.top_logprobs
    asked = line(
        "a", min_tokens=2, min_p=0.1, repetition_penalty=1.5, frequency_penalty=1, presence_penalty=-1,
        logit_bias={"7": -100, "12": 3}, stop_token_ids=[9], ignore_eos=True, logprobs=3, prompt_logprobs=0,
    )  # fmt: skip
    (request,) = read(served, asked).requests
    assert request.rules == LogitRules(
        min_tokens=2, bias=((12, 3), (7, -100)), repetition_penalty=1.5, frequency_penalty=1,
        presence_penalty=-1, min_p=0.1,
    )  # fmt: skip
    assert request.stop_token_ids == {9} and request.top_logprobs == 3 and request.prompt_logprobs


def test_seeds_depend_on_the_request_alone(served: Served) -> None:
    def seeds(**changes: Any) -> list[int]:
        custom_id = changes.pop("custom_id", "a")
        return [one.seed for one in read(served, line(custom_id, temperature=1, n=2, **changes)).requests]

    assert len(set(seeds())) == 2, "choices are different draws"
    assert seeds() == seeds() and seeds() != seeds(custom_id="b"), "one request asked twice is two draws"
    assert seeds(seed=5) == seeds(seed=5, custom_id="b") != seeds(seed=6), "unless it brings its own seed"


def test_chat_is_the_models_own_format(served: Served) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "wa"}, {"type": "text", "text": "ter"}]}
    request = read(served, chat({"role": "system", "content": "be brief"}, parts))
    assert request.prompts[0].source == b"system: be brief\nuser: water\nassistant:"
    assert request.requests[0].max_new_tokens == 20, "the batch command's own default"
    assert read(served, chat(parts, max_tokens=3)).requests[0].max_new_tokens == 3
    assert read(served, chat(parts, max_tokens=3, max_completion_tokens=5)).requests[0].max_new_tokens == 5
    told = {"chat_template_kwargs": {"mood": "glad"}, "add_generation_prompt": False}
    assert read(served, chat(parts, **told)).prompts[0].source == b"user: water\nglad"
    last = {"role": "assistant", "content": "boils at"}
    on = chat(parts, last, add_generation_prompt=False, continue_final_message=True)
    assert read(served, on).prompts[0].source == b"user: water\nassistant: boils at"


def test_a_chat_without_a_limit_gets_what_the_window_leaves(served: Served) -> None:
    (request,) = read(served, chat({"role": "user", "content": "0 " * 230})).requests
    assert len(request.prompt) + request.max_new_tokens == 257, "the last generated token is never computed"


def test_the_key_changes_with_everything_that_changes_the_answer(served: Served) -> None:
    def key(content: dict[str, Any], fingerprint: str = "f") -> str:
        return read_envelope(json.dumps(content).encode(), fingerprint).key

    keys = {key(line("a")), key(line("b")), key(line("a", max_tokens=5)), key(line("a"), "g")}
    assert len(keys) == 4
    reordered = dict(reversed(line("a").items()))
    assert key(reordered) == key(line("a"))
