"""The engine's outputs as one line of a batch result (OpenAI's format), and errors as another.

It knows the format of a result and the tokenizer, and nothing of files or of the engine.

A line is ``{"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"}``. It
depends on the request, the model and how it is compressed only, never on when or beside what it was
answered; therefore ``created`` is 0.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from engine.spec.request import FinishReason, Output
from harness.openai_batch.fields import LineError
from harness.openai_batch.request import CHAT, BatchRequest, Prompt, Served
from harness.tokenizer import Piece, Text, generated_pieces, prompt_pieces, shown

RECORD_PREFIX = "batch_req_"
"""Begins the id of every line of ours; the rest is its key."""

_KEY_LENGTH = 24

_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""

_REASONS: Mapping[FinishReason, str] = {"length": "length", "stop": "stop", "eos": "stop"}


def record_id(key: str) -> str:
    """Id of the line that answers a request with this key."""
    return RECORD_PREFIX + key[:_KEY_LENGTH]


def answer_record(request: BatchRequest, outputs: Sequence[Output], served: Served) -> dict[str, Any]:
    """The line of an answered request; ``outputs`` are one per engine request, in their order."""
    chat, short = request.envelope.url == CHAT, request.envelope.key[:_KEY_LENGTH]
    choice = _chat_choice if chat else _completion_choice
    prompts = [prompt for prompt in request.prompts for _ in range(request.choices)]
    read = sum(len(prompt.tokens) for prompt in request.prompts)
    written = sum(len(output.tokens) for output in outputs)
    body = {
        "id": ("chatcmpl-" if chat else "cmpl-") + short,
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": served.names[0],
        "system_fingerprint": f"fp_{served.fingerprint[:_KEY_LENGTH]}",
        "choices": [
            {"index": index} | choice(request, prompt, output, served.text)
            for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }
    return _record(request.envelope.key, request.envelope.custom_id, 200, body, None)


def error_record(key: str, line: int, error: LineError) -> dict[str, Any]:
    """The line of a request that cannot be answered: line ``line`` from 1, whose digest is ``key``."""
    message = f"line {line}: {error}"
    body = {"message": message, "type": "invalid_request_error", "param": error.param, "code": error.code}
    short = {"code": error.code, "message": message}
    return _record(key, error.custom_id, error.status, {"error": body}, short)


def _record(
    key: str, custom_id: str | None, status: int, body: dict[str, Any], error: dict[str, Any] | None
) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{key[:_KEY_LENGTH]}", "body": body}
    return {"id": record_id(key), "custom_id": custom_id, "response": response, "error": error}


def _chat_choice(request: BatchRequest, prompt: Prompt, output: Output, text: Text) -> dict[str, Any]:
    pieces = generated_pieces(output, request.stops, text)
    content = [
        {"token": shown(data), "logprob": _finite(logprob), "bytes": list(data), "top_logprobs": []}
        for data, logprob in pieces
    ]
    return {
        "message": {"role": "assistant", "content": _joined(pieces), "refusal": None},
        "logprobs": {"content": content, "refusal": None} if request.logprobs else None,
        "finish_reason": _REASONS[output.finish_reason],
    }


def _completion_choice(request: BatchRequest, prompt: Prompt, output: Output, text: Text) -> dict[str, Any]:
    generated = generated_pieces(output, request.stops, text)
    echoed: list[Piece] = []
    if request.echo:
        data = prompt_pieces(prompt.ids, prompt.source, text)
        known = [None, *(output.prompt_logprobs or [None] * (len(prompt.tokens) - 1))][len(prompt.prefix) :]
        echoed = list(zip(data, known, strict=True))
    before = prompt.source.decode(errors="replace") if request.echo else ""
    return {
        "text": before + _joined(generated),
        "logprobs": _completion_logprobs([*echoed, *generated]) if request.logprobs else None,
        "finish_reason": _REASONS[output.finish_reason],
    }


def _completion_logprobs(pieces: Sequence[Piece]) -> dict[str, Any]:
    decoder, offset, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    for data, _ in pieces:
        offsets.append(offset)
        offset += len(decoder.decode(data))
    return {
        "tokens": [shown(data) for data, _ in pieces],
        "token_logprobs": [_finite(logprob) for _, logprob in pieces],
        "top_logprobs": None,
        "text_offset": offsets,
    }


def _joined(pieces: Sequence[Piece]) -> str:
    return b"".join(data for data, _ in pieces).decode(errors="replace")


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LOWEST)
