"""One HELM request in the engine's terms, and the engine's outputs as one HELM result.

It knows HELM's `Request` and `RequestResult` and the tokenizer, and nothing of runs or files.

What goes through the model. For a generation it is what the tokenizer makes of a text: its own beginning ids
and the prompt. For a scored prompt (``echo_prompt``) it is ``Text.scoring_prefix`` and the prompt. Ids put in
front are never returned. Where the prompt's text begins with them itself, nothing is put in front, and the
first token, having nothing before it, gets a log-probability of 0.0. So does the first token under a
tokenizer that has neither a beginning- nor an end-of-text id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import RequestError
from engine.spec.request import FinishReason, Output, Request
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


def make_question(request: helm.Request, text: Text, seed: int) -> Question:
    """Translate a HELM request.

    Args:
        request: as HELM's adapters make it.
        text: the model's tokenizer.
        seed: the user's; a sampled completion's own seed is derived from it, the request's content,
            its ``random`` and the completion's index, never from what else is in the batch.

    Raises:
        RequestError: for a feature that text models do not have (images, embeddings, penalties).
    """
    _refuse_unsupported(request)
    stops = require_stop_strings(request.stop_sequences)
    source = text.chat(request.messages) if request.messages else request.prompt
    prompt = text.encode(source)
    scored = request.echo_prompt or request.max_tokens == 0
    prefix = text.scoring_prefix if scored or not prompt else text.start_ids
    hidden = 0 if request.messages or (prompt and prompt[: len(prefix)] == prefix) else len(prefix)
    ids = prefix[:hidden] + prompt
    if not ids:
        raise RequestError("a prompt is empty and the tokenizer has no beginning-of-text id to start from")
    if request.max_tokens == 0 and len(ids) < 2:
        return Question((), (), prompt, hidden, request.echo_prompt, stops, source.encode())
    content = {
        "prompt": ids,
        "max_new_tokens": request.max_tokens,
        "prompt_logprobs": scored,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stops": stops,
        "end_ids": sorted(text.end_ids),
    }
    stop = text.stop_check(stops)
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
    return Question(tuple(requests), tuple(keys), prompt, hidden, request.echo_prompt, stops, source.encode())


def make_result(question: Question, outputs: Sequence[Output], text: Text) -> helm.RequestResult:
    """Build HELM's result from the outputs, one per request of the question.

    A request's time is its share of the passes it took part in: their wall time divided by the
    sequences that shared them. HELM's denoised runtime is that share; its observed runtime is the
    share times the (rounded) batch size, which is the passes' wall time.
    """
    from helm.common.request import RequestResult

    if not question.requests:
        outputs = (_UNUSED,)
    share = sum(output.block_seconds / output.block_size for output in outputs)
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
    visible += generated_pieces(output, question.stops, text)
    return GeneratedOutput(
        text=b"".join(data for data, _ in visible).decode(errors="replace"),
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
