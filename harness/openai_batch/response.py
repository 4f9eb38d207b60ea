"""The engine's outputs as one line of a batch result (OpenAI's format), and errors as another.

It knows the format of a result and the tokenizer, and nothing of files or of the engine.

A line is ``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``. What a request
got wrong is in the body, as a server would answer; ``error`` is null. A reproducible answer depends on the
request, the model and how it is compressed only, never on when or beside what it was answered: ``created`` is
0, and nothing is said of shared prefixes.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from engine.spec.request import FinishReason, Output, TopTokens
from harness.detokenizer import LeftOut, text_of
from harness.identity import Identity
from harness.openai_batch.fields import LineError
from harness.openai_batch.prompts import Prompt
from harness.openai_batch.request import CHAT, BatchRequest, Served
from harness.tokenizer import Text, generated_pieces, prompt_pieces, shown

RECORD_PREFIX = "batch_req_"
"""Begins the id of every line of ours; the rest is its key."""

_KEY_LENGTH = 24

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""

_REASONS: Mapping[FinishReason, str] = {"length": "length", "stop": "stop", "eos": "stop"}


def shown_fingerprint(identity: Identity) -> str:
    """An identity as ``system_fingerprint``: some digits of each part, and the date that a template shows."""
    return "_".join(filter(None, ("fp", identity.fingerprint, identity.date)))


def changed_parts(identity: Identity, shown: str) -> list[str]:
    """Names of the parts in which an answer's ``system_fingerprint`` is that of another identity."""
    return identity.changed_parts(shown.removeprefix("fp_").partition("_")[0])


def shown_date(shown: str) -> date | None:
    """The date that the template showed for an answer, from its ``system_fingerprint``; None for none."""
    try:
        return date.fromisoformat(shown.removeprefix("fp_").partition("_")[2])
    except ValueError:
        return None


def record_id(key: str) -> str:
    """Id of the line that answers a request with this key."""
    return RECORD_PREFIX + key[:_KEY_LENGTH]


@dataclass(frozen=True)
class _Shown:
    """A token of an answer."""

    token: int
    data: bytes
    """Its bytes as far as they are shown."""

    logprob: float | None
    """None if it is not known."""

    top: TopTokens | None
    """The most probable tokens at its place, where they are wanted."""

    def beside(self, count: int, text: Text) -> Iterator[tuple[bytes, float]]:
        """Bytes and log-probabilities of the ``count`` most probable tokens at its place."""
        if self.top is not None:
            top = self.top.first(count)
            for token, logprob in zip(top.tokens, top.logprobs, strict=True):
                yield self.data if token == self.token else text.token_bytes(token), logprob


def answer_record(request: BatchRequest, outputs: Sequence[Output], served: Served) -> dict[str, Any]:
    """The line of an answered request; ``outputs`` are one per engine request, in their order.

    Raises:
        LineError: if a grammar was asked for and could not be followed to the end.
    """
    if request.grammar is not None and request.grammar.problem:
        raise LineError(
            f"response_format cannot be followed to the end ({request.grammar.problem})",
            status=500, code="grammar_failed", param="response_format",
            custom_id=request.envelope.custom_id,
        )  # fmt: skip
    chat, short, text = request.envelope.url == CHAT, request.envelope.key[:_KEY_LENGTH], served.prompts.text
    choice = _chat_choice if chat else _completion_choice
    prompts = [prompt for prompt in request.prompts for _ in range(request.choices)]
    body: dict[str, Any] = {
        "id": ("chatcmpl-" if chat else "cmpl-") + short,
        "object": "chat.completion" if chat else "text_completion",
        "created": 0 if served.reproducible else int(time.time()),
        "model": served.names[0],
        "system_fingerprint": served.system_fingerprint,
        "choices": [
            {"index": index} | choice(request, prompt, output, text)
            for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ],
        "usage": _usage(request, outputs, served.reproducible),
    }
    if chat and request.wanted.prompt_logprobs is not None:
        body["prompt_logprobs"] = _prompt_logprobs(request, prompts[0], outputs[0], text)
    return _record(request.envelope.key, request.envelope.custom_id, 200, body)


def error_record(key: str, line: int, error: LineError) -> dict[str, Any]:
    """The line of a request that cannot be answered: line ``line`` from 1, whose digest is ``key``."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    shown = {"message": f"line {line}: {error}", "type": kind, "param": error.param, "code": error.code}
    return _record(key, error.custom_id, error.status, {"error": shown})


def _record(key: str, custom_id: str | None, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{key[:_KEY_LENGTH]}", "body": body}
    return {"id": record_id(key), "custom_id": custom_id, "response": response, "error": None}


def _usage(request: BatchRequest, outputs: Sequence[Output], reproducible: bool) -> dict[str, Any]:
    """Tokens of all choices; each prompt is counted once."""
    read = sum(len(prompt.tokens) for prompt in request.prompts)
    written = sum(len(output.tokens) for output in outputs)
    usage: dict[str, Any] = {
        "prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written,
    }  # fmt: skip
    if not reproducible:
        firsts = outputs[:: request.choices]
        usage["prompt_tokens_details"] = {"cached_tokens": sum(output.shared_tokens for output in firsts)}
    return usage


def _chat_choice(request: BatchRequest, prompt: Prompt, output: Output, text: Text) -> dict[str, Any]:
    generated, count = _generated(request, prompt, output, text), request.wanted.logprobs
    logprobs = None
    if count is not None:
        content = [
            _entry(one.data, one.logprob)
            | {"top_logprobs": [_entry(data, logprob) for data, logprob in one.beside(count, text)]}
            for one in generated
        ]
        logprobs = {"content": content, "refusal": None}
    return {
        "message": {"role": "assistant", "content": _joined(generated), "refusal": None},
        "logprobs": logprobs,
        "finish_reason": _REASONS[output.finish_reason],
    }


def _entry(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": shown(data), "logprob": _finite(logprob), "bytes": list(data)}


def _completion_choice(request: BatchRequest, prompt: Prompt, output: Output, text: Text) -> dict[str, Any]:
    generated, wanted = _generated(request, prompt, output, text), request.wanted
    echoed = _echoed(prompt, output, text) if wanted.echo else []
    before = prompt.source.decode(errors="replace") if wanted.echo else ""
    logprobs = None
    if wanted.logprobs is not None:
        logprobs = _completion_logprobs([*echoed, *generated], wanted.logprobs, text)
    choice: dict[str, Any] = {
        "text": before + _joined(generated),
        "logprobs": logprobs,
        "finish_reason": _REASONS[output.finish_reason],
    }
    if wanted.prompt_logprobs is not None:
        choice["prompt_logprobs"] = _prompt_logprobs(request, prompt, output, text)
    return choice


def _generated(request: BatchRequest, prompt: Prompt, output: Output, text: Text) -> list[_Shown]:
    """The generated tokens that are shown."""
    pieces = generated_pieces(
        output, request.stops, text, request.requests[0].rules.min_tokens, prompt.tokens,
        skip_special=not request.wanted.special,
    )  # fmt: skip
    tops = output.top_logprobs or [None] * len(output.tokens)
    return [
        _Shown(token, data, logprob, top)
        for token, (data, logprob), top in zip(output.tokens, pieces, tops, strict=False)
    ]


def _echoed(prompt: Prompt, output: Output, text: Text) -> list[_Shown]:
    """The prompt's own tokens."""
    left = len(prompt.tokens) - 1
    known = [None, *(output.prompt_logprobs or [None] * left)][len(prompt.prefix) :]
    tops = [None, *(output.prompt_top_logprobs or [None] * left)][len(prompt.prefix) :]
    data = prompt_pieces(prompt.ids, prompt.source, text)
    return [_Shown(*one) for one in zip(prompt.ids, data, known, tops, strict=True)]


def _completion_logprobs(tokens: Sequence[_Shown], count: int, text: Text) -> dict[str, Any]:
    decoder, offset, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    for one in tokens:
        offsets.append(offset)
        offset += 0 if isinstance(one.data, LeftOut) else len(decoder.decode(one.data))
    return {
        "tokens": [shown(one.data) for one in tokens],
        "token_logprobs": [_finite(one.logprob) for one in tokens],
        "top_logprobs": [_by_text(one, count, text) for one in tokens],
        "text_offset": offsets,
    }


def _by_text(one: _Shown, count: int, text: Text) -> dict[str, float] | None:
    """The most probable tokens and the one that is there; of tokens with one text the most probable."""
    if one.logprob is None:
        return None
    found: dict[str, float] = {}
    for data, logprob in (*one.beside(count, text), (one.data, one.logprob)):
        found.setdefault(shown(data), max(logprob, _LOWEST))
    return found


def _prompt_logprobs(
    request: BatchRequest, prompt: Prompt, output: Output, text: Text
) -> list[dict[str, Any] | None]:
    """The prompt's log-probabilities as vLLM writes them, its prefix included: by token id, with ranks."""
    found: list[dict[str, Any] | None] = [None]
    count = request.wanted.prompt_logprobs or 0
    known = zip(prompt.tokens[1:], output.prompt_logprobs or (), output.prompt_top_logprobs, strict=True)
    for token, logprob, top in known:
        ranked = [(token, logprob, top.rank)]
        best = top.first(count)
        ranked += [
            (other, value, rank)
            for rank, (other, value) in enumerate(zip(best.tokens, best.logprobs, strict=True), start=1)
            if other != token
        ]
        found.append({
            str(one): {
                "logprob": _finite(value),
                "rank": rank,
                "decoded_token": text.token_bytes(one).decode(errors="replace"),
            }
            for one, value, rank in ranked
        })  # fmt: skip
    return found


def _joined(tokens: Sequence[_Shown]) -> str:
    return text_of([one.data for one in tokens])


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST)
