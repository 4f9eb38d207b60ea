"""HELM requests to engine requests and back, against plain `transformers` computations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import RequestError, UsageError
from engine.spec.policy import Policy
from engine.spec.request import Output
from engine.spec.settings import EngineSettings
from harness.helm.translate import make_question, make_result
from harness.tokenizer import Text
from tests.support.reference_engine import ReferenceEngine
from tests.support.tiny_models import save_tiny_sentencepiece
from tests.support.tiny_tokenizers import KINDS

helm = pytest.importorskip("helm.common.request")

Ask = Callable[..., Any]
LogProbs = Callable[[tuple[int, ...]], list[float]]


@pytest.fixture(scope="module")
def text(tiny_opt_dir: Path) -> Text:
    return Text.load(str(tiny_opt_dir))


@pytest.fixture(scope="module")
def ask(tiny_opt_dir: Path, text: Text) -> Ask:
    """Answer one HELM request with the reference engine."""
    engine = ReferenceEngine(EngineSettings(str(tiny_opt_dir)), Policy())

    def ask(seed: int = 0, **fields: Any) -> Any:
        question = make_question(helm.Request(**fields), text, seed)
        return make_result(question, engine.answer(question.requests), text)

    return ask


@pytest.fixture(scope="module")
def logprobs(tiny_opt_dir: Path) -> LogProbs:
    """log p(token i | those before it), i = 1 .. n-1, by `transformers` alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_opt_dir, dtype=torch.float32).eval()

    def compute(ids: tuple[int, ...]) -> list[float]:
        with torch.inference_mode():
            table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [table[i, token].item() for i, token in enumerate(ids[1:])]

    return compute


def values(completion: Any) -> list[float]:
    return [token.logprob for token in completion.tokens]


def test_a_scored_prompt_has_a_probability_for_every_token(ask: Ask, text: Text, logprobs: LogProbs) -> None:
    result = ask(prompt="the “quoted” word", echo_prompt=True, max_tokens=0, temperature=0)
    (completion,) = result.completions
    ids = text.encode("the “quoted” word")
    assert values(completion) == pytest.approx(logprobs((2, *ids)), abs=1e-5)
    assert completion.text == "the “quoted” word"
    assert completion.logprob == pytest.approx(sum(values(completion)))


def test_a_beginning_given_as_text_is_returned_with_zero(ask: Ask, text: Text, logprobs: LogProbs) -> None:
    (completion,) = ask(prompt="</s>the word", echo_prompt=True, max_tokens=0, temperature=0).completions
    assert completion.tokens[0].text == "</s>"
    assert values(completion) == pytest.approx([0.0, *logprobs((2, *text.encode("the word")))], abs=1e-5)


def test_a_tokenizer_without_any_beginning_gives_the_first_token_zero(text: Text) -> None:
    bare = Text(text.tokenizer)
    bare.start_ids = bare.scoring_prefix = ()
    question = make_question(helm.Request(prompt="the word", echo_prompt=True, max_tokens=0), bare, 0)
    known = (-1.5,) * (len(question.prompt) - 1)
    output = Output((), (), known, "length", 1, 0.1)
    result = make_result(question, [output], bare)
    assert values(result.completions[0]) == [0.0, *known]


@pytest.mark.parametrize(("prompt", "has_beginning"), [("", True), ("", False), ("a", False)])
def test_a_score_of_nothing_is_refused(text: Text, prompt: str, has_beginning: bool) -> None:
    bare = Text(text.tokenizer)
    if not has_beginning:
        bare.start_ids = bare.scoring_prefix = ()
    with pytest.raises(RequestError, match=r"nothing could be scored|prompt is empty"):
        make_question(helm.Request(prompt=prompt, echo_prompt=True, max_tokens=0), bare, 0)


def test_one_token_with_nothing_before_it_needs_no_computation(text: Text) -> None:
    question = make_question(helm.Request(prompt="</s>", echo_prompt=True, max_tokens=0), text, 0)
    assert question.requests == ()
    (completion,) = make_result(question, [], text).completions
    assert [(token.text, token.logprob) for token in completion.tokens] == [("</s>", 0.0)]


def test_greedy_generation_equals_transformers(
    ask: Ask, text: Text, tiny_opt_dir: Path, logprobs: LogProbs
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    (completion,) = ask(prompt="Question: the apple", max_tokens=12, temperature=0).completions
    model = AutoModelForCausalLM.from_pretrained(tiny_opt_dir, dtype=torch.float32)
    ids = (2, *text.encode("Question: the apple"))
    made = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    expected = made[:-1] if made[-1] == 2 else made
    assert completion.text == text.join(expected).decode(errors="replace")
    assert values(completion) == pytest.approx(logprobs((*ids, *expected))[len(ids) - 1 :], abs=1e-5)


def test_completions_differ_and_depend_on_their_own_seed_only(ask: Ask) -> None:
    sampled = {"prompt": "Question: the", "max_tokens": 8, "temperature": 1.0, "num_completions": 4}
    first = [completion.text for completion in ask(**sampled).completions]
    assert len(set(first)) > 1
    assert [completion.text for completion in ask(**sampled).completions] == first
    assert [completion.text for completion in ask(**sampled | {"num_completions": 2}).completions] == first[
        :2
    ]
    assert [completion.text for completion in ask(**sampled, random="1").completions] != first
    assert [completion.text for completion in ask(**sampled, seed=1).completions] != first


def test_greedy_completions_are_one_request(text: Text) -> None:
    question = make_question(helm.Request(prompt="a", num_completions=3, temperature=0), text, 0)
    assert len(set(question.keys)) == 1 and len(question.requests) == 3


def test_keys_tell_apart_what_answers_depend_on(text: Text) -> None:
    base = helm.Request(prompt="the", max_tokens=4, temperature=0.5)
    changes: list[dict[str, Any]] = [
        {"prompt": "The"},
        {"max_tokens": 5},
        {"temperature": 0.6},
        {"top_p": 0.9},
        {"stop_sequences": ["e"]},
        {"random": "1"},
        {"echo_prompt": True},
    ]
    requests = [
        base,
        *(helm.Request(**{"prompt": "the", "max_tokens": 4, "temperature": 0.5} | c) for c in changes),
    ]
    keys = {make_question(request, text, 0).keys for request in requests}
    keys.add(make_question(base, text, 1).keys)
    assert len(keys) == len(changes) + 2


def cut(text: Text, generated: str, stops: list[str], reason: Any = "stop") -> Any:
    ids = text.encode(generated)
    question = make_question(helm.Request(prompt="the", stop_sequences=stops, max_tokens=50), text, 0)
    output = Output(ids, tuple(-float(i) for i in range(len(ids))), None, reason, 1, 0.1)
    return make_result(question, [output], text).completions[0]


def test_text_and_tokens_are_cut_before_the_stop_string(text: Text) -> None:
    completion = cut(text, "one two###", ["###", "two#"])
    assert completion.text == "one " == "".join(token.text for token in completion.tokens)
    assert completion.finish_reason == {"reason": "stop"}
    assert completion.logprob == sum(values(completion))


def test_a_token_that_holds_text_and_stop_string_is_kept_with_its_text(text: Text) -> None:
    (token,) = [piece for piece in map(text.token_bytes, range(400)) if piece == b" the"][:1] or [b""]
    assert token, "the tokenizer of the fixture has no token ' the'"
    completion = cut(text, "a the", ["he"])
    assert completion.text == "a t" and completion.tokens[-1].text == " t"


def test_the_end_token_is_not_part_of_the_text(text: Text) -> None:
    question = make_question(helm.Request(prompt="the", max_tokens=5), text, 0)
    output = Output((*text.encode("a"), 2), (-1.0, -2.0), None, "eos", 1, 0.1)
    (completion,) = make_result(question, [output], text).completions
    assert (completion.text, completion.logprob) == ("a", -1.0)
    assert completion.finish_reason == {"reason": "endoftext"}


def test_half_a_character_is_a_replacement_in_the_text_and_bytes_in_the_token(text: Text) -> None:
    half = text.encode("€")[:1]
    question = make_question(helm.Request(prompt="the", max_tokens=1), text, 0)
    (completion,) = make_result(question, [Output(half, (-1.0,), None, "length", 1, 0.1)], text).completions
    assert completion.text == "\ufffd" and completion.tokens[0].text.startswith("bytes:\\xe2")


def test_times_are_shares_of_passes(text: Text) -> None:
    question = make_question(
        helm.Request(prompt="the", num_completions=2, temperature=1, max_tokens=1), text, 0
    )
    outputs = [Output((5,), (-1.0,), None, "length", 8, 4.0), Output((5,), (-1.0,), None, "length", 4, 4.0)]
    result = make_result(question, outputs, text)
    assert result.request_time == pytest.approx(4 / 8 + 4 / 4)
    assert result.batch_size == 6
    assert result.batch_request_time / result.batch_size == pytest.approx(result.request_time)


def test_the_space_that_sentencepiece_adds_is_no_byte_of_the_text(tmp_path: Path) -> None:
    codec = Text.load(str(save_tiny_sentencepiece(tmp_path)))
    question = make_question(helm.Request(prompt="the apple é", echo_prompt=True, max_tokens=0), codec, 0)
    count = len(question.prompt)
    output = Output((), (), (-1.0,) * count, "length", 1, 0.1)
    (completion,) = make_result(question, [output], codec).completions
    assert completion.text == "the apple é" and len(completion.tokens) == count


@pytest.mark.parametrize(
    "fields",
    [{"presence_penalty": 0.5}, {"frequency_penalty": 0.1}, {"embedding": True}],
    ids=lambda f: next(iter(f)),
)
def test_what_the_engine_has_not_is_refused(text: Text, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="is not available"):
        make_question(helm.Request(prompt="the", **fields), text, 0)


def test_a_chat_needs_a_template(text: Text) -> None:
    request = helm.Request(messages=[{"role": "user", "content": "Hello"}], max_tokens=1)
    with pytest.raises(UsageError, match="chat template"):
        make_question(request, text, 0)


def test_a_chat_is_written_by_the_template(tiny_opt_dir: Path) -> None:
    text = Text.load(str(tiny_opt_dir))
    text.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [model]"
    request = helm.Request(messages=[{"role": "user", "content": "Hello"}], max_tokens=1)
    question = make_question(request, text, 0, chat=True)
    assert question.requests[0].prompt == text.encode("[user] Hello [model]")
    with pytest.raises(RequestError, match="give --chat auto"):
        make_question(request, text, 0)


def test_special_tokens_in_the_middle_are_shown_as_by_helms_own_client(tmp_path: Path) -> None:
    KINDS["byte fallback"]().save_pretrained(tmp_path)
    codec = Text.load(str(tmp_path))
    ids = (*codec.encode("the"), codec.tokenizer.convert_tokens_to_ids("<sep>"), *codec.encode("a"))
    question = make_question(helm.Request(prompt="hello", max_tokens=9), codec, 0)
    output = Output(ids, (-1.0,) * len(ids), None, "length", 1, 0.1)
    (completion,) = make_result(question, [output], codec).completions
    assert completion.text == codec.tokenizer.decode(ids) == "the<sep> a"
    assert "".join(token.text for token in completion.tokens) == completion.text
