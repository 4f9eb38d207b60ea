"""One HELM request in the engine's terms, and the engine's outputs as one HELM result.

It knows HELM's `Request` and `RequestResult` and the tokenizer, and nothing of runs or files.

What goes through the model. For a generation it is what the tokenizer makes of a text: its own beginning ids
and the prompt. For a scored prompt (``echo_prompt``) it is ``Text.scoring_prefix`` and the prompt. Ids put in
front are never returned. Where the prompt's text begins with them itself, nothing is put in front, and the
first token, having nothing before it, gets a log-probability of 0.0. So does the first token under a
tokenizer that has neither a beginning- nor an end-of-text id. A prompt that would be scored by such a token
alone is refused.

A model that chats is asked as HELM's own client for `transformers` asks it: the prompt is a user's message in
the tokenizer's template, whose own beginning is not put in front again. A scored prompt stays as it is, since
a score is wanted of its own last tokens, not of the template's. Texts are decoded as by that client, too:
special tokens in the middle of an answer are shown, and without the prompt the answer begins the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.errors import RequestError
from engine.spec.request import FinishReason, Output, Request
from harness.detokenizer import text_of
from harness.tokenizer import Text, generated_pieces, prompt_pieces, require_stop_strings, shown

if TYPE_CHECKING:
    from helm.common import request as helm

_REASONS: Mapping[FinishReason, str] = {"length": "length", "stop": "stop", "eos": "endoftext"}
_UNUSED = Output((), (), (), "length", block_size=1, block_seconds=0.0)


@dataclass(frozen=True)
class Question:
    """One HELM request in the engine's terms."""

    requests: tuple[Request, ...]
    """One per completion; none where nothing has to be computed."""

    keys: tuple[str, ...]
    """Content hash of each request; equal requests have equal keys."""

    prompt: tuple[int, ...]
    """The prompt's own ids, without what was put in front."""

    hidden: int
    """Ids that were put in front of the prompt."""

    echo: bool
    """Whether the prompt's tokens belong to the answer."""

    stops: tuple[str, ...]
    """Strings before which a generated text is cut."""

    source: bytes
    """The prompt as text, UTF-8."""

    templated: bool = False
    """Whether the prompt was put into the tokenizer's chat template."""

    @property
    def context(self) -> tuple[int, ...]:
        """What stands before a generated text that is returned: the prompt, if it is returned itself."""
        return self.prompt if self.echo else ()


def make_question(request: helm.Request, text: Text, seed: int, chat: bool = False) -> Question:
    """Translate a HELM request.

    Args:
        request: as HELM's adapters make it.
        text: the model's tokenizer.
        seed: the user's; a sampled completion's own seed is derived from it, the request's content,
            its ``random`` and the completion's index, never from what else is in the batch.
        chat: whether the prompt is put as a user's message into the tokenizer's chat template.

    Raises:
        RequestError: for a feature that text models do not have (images, embeddings, penalties), for a
            conversation without ``chat``, and for a scored prompt with no token that has a probability.
    """
    _refuse_unsupported(request)
    stops = require_stop_strings(request.stop_sequences)
    scored = request.echo_prompt or request.max_tokens == 0
    source, templated = _source(request, text, chat, scored)
    prompt = text.encode(source)
    prefix = text.scoring_prefix if scored or not prompt else text.start_ids
    hidden = 0 if templated or (prompt and prompt[: len(prefix)] == prefix) else len(prefix)
    ids = prefix[:hidden] + prompt
    question = Question((), (), prompt, hidden, request.echo_prompt, stops, source.encode(), templated)
    if not ids:
        raise RequestError("a prompt is empty and the tokenizer has no beginning-of-text id to start from")
    if request.max_tokens == 0 and len(ids) < 2:
        if not prompt or prompt != text.scoring_prefix:
            raise RequestError(
                f"the prompt {request.prompt[:60]!r} is to be scored and has no token after another one, so "
                "that nothing could be scored: leave its instance or its empty choice out"
            )
        return question
    content = {
        "prompt": ids,
        "max_new_tokens": request.max_tokens,
        "prompt_logprobs": scored,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stops": stops,
        "end_ids": sorted(text.end_ids),
    }
    stop = text.stop_check(stops, question.context)
    requests, keys = [], []
    for index in range(request.num_completions):
        sampled = request.temperature > 0 and request.max_tokens > 0
        own_seed = int(_digest([content, request.random, index, seed])[:15], 16) if sampled else 0
        keys.append(_digest([content, own_seed]))
        requests.append(
            Request(
                prompt=ids,
                max_new_tokens=request.max_tokens,
                prompt_logprobs=scored,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=own_seed,
                stop_token_ids=text.end_ids,
                stop=stop,
            )
        )
    return replace(question, requests=tuple(requests), keys=tuple(keys))


def _source(request: helm.Request, text: Text, chat: bool, scored: bool) -> tuple[str, bool]:
    """The text that is to be encoded, and whether the chat template wrote it."""
    if request.messages:
        if not chat and text.tokenizer.chat_template:
            raise RequestError(
                "a request is a conversation, which cannot be asked without the chat template: give "
                "--chat auto"
            )
        return text.chat(request.messages), True
    if chat and not scored:
        return text.chat([{"role": "user", "content": request.prompt}]), True
    return request.prompt, False


def make_result(question: Question, outputs: Sequence[Output], text: Text) -> helm.RequestResult:
    """Build HELM's result from the outputs, one per request of the question.

    A request's time is its share of the passes it took part in, by the work of its tokens. HELM's denoised
    runtime is that share; its observed runtime is the share times the (rounded) batch size, which is the
    passes' wall time.
    """
    from helm.common.request import RequestResult

    if not question.requests:
        outputs = (_UNUSED,)
    share = sum(output.seconds for output in outputs)
    batch = max(1, round(sum(output.block_size for output in outputs) / len(outputs)))
    return RequestResult(
        success=True,
        embedding=[],
        completions=[_completion(question, output, text) for output in outputs],
        cached=False,
        request_time=share,
        batch_size=batch,
        batch_request_time=share * batch,
    )


def _completion(question: Question, output: Output, text: Text) -> helm.GeneratedOutput:
    from helm.common.request import GeneratedOutput, Token

    visible: list[tuple[bytes, float]] = []
    if question.echo:
        pieces = prompt_pieces(question.prompt, question.source, text)
        visible += zip(pieces, _prompt_logprobs(question, output), strict=True)
    visible += generated_pieces(output, question.stops, text, context=question.context)
    return GeneratedOutput(
        text=text_of([data for data, _ in visible]),
        logprob=sum(logprob for _, logprob in visible),
        tokens=[Token(text=shown(data), logprob=logprob) for data, logprob in visible],
        finish_reason={"reason": _REASONS[output.finish_reason]},
    )


def _prompt_logprobs(question: Question, output: Output) -> Sequence[float]:
    computed = output.prompt_logprobs or ()
    if question.hidden:
        return computed[question.hidden - 1 :]
    return (0.0, *computed) if question.prompt else ()


def _refuse_unsupported(request: helm.Request) -> None:
    unsupported = {
        "embedding": request.embedding,
        "multimodal_prompt": request.multimodal_prompt,
        "image_generation_parameters": request.image_generation_parameters,
        "response_format": request.response_format,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
    }
    for name, value in unsupported.items():
        if value:
            raise RequestError(
                f"a request sets {name}={value!r}, which is not available: leave the entry out"
            )


def _digest(content: object) -> str:
    """SHA-256 of a JSON-able value, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
