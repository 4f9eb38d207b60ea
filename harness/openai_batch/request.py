"""One line of a batch file (OpenAI's format) as requests to the engine.

It knows the format of a line and the tokenizer, and nothing of files, of answers or of the engine.

A line is ``{"custom_id", "method": "POST", "url", "body"}``. What a body says is either done or
refused with a clear reason; nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import UsageError
from engine.spec.request import Request
from harness.environment import first_line
from harness.openai_batch.fields import Fields, LineError, utf8
from harness.tokenizer import Text, require_stop_strings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

_COMPLETION_TOKENS = 16
"""OpenAI's ``max_tokens`` of a completion that sets none."""

_MOST_CHOICES = 128


@dataclass(frozen=True)
class Served:
    """Who answers, as far as a line has to know."""

    text: Text
    names: Sequence[str]
    """What the ``model`` of a body may be; the first one is written into answers."""

    vocab_size: int
    max_positions: int | None
    seed: int
    """The user's; seeds of requests that bring none are derived from it."""

    chat_tokens: int
    """Most generated tokens of a chat request that does not say."""

    fingerprint: str
    """Identifies all that answers depend on besides the line itself."""


@dataclass(frozen=True)
class Envelope:
    """A line whose request has not been looked at yet."""

    custom_id: str
    key: str
    """Digest of everything that the answer depends on."""

    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the tokens of one choice."""

    ids: tuple[int, ...]
    """The prompt's own tokens, without ``prefix``."""

    prefix: tuple[int, ...]
    """Tokens that the tokenizer puts before a text; never part of an answer."""

    source: bytes
    """The prompt as text, UTF-8."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """All input tokens of the model."""
        return self.prefix + self.ids


@dataclass(frozen=True)
class BatchRequest:
    """One line, ready for the engine."""

    envelope: Envelope
    prompts: Sequence[Prompt]
    choices: int
    """Answers per prompt."""

    requests: Sequence[Request]
    """All choices of the first prompt, then those of the next."""

    stops: Sequence[str]
    echo: bool
    logprobs: bool


def read_envelope(line: bytes, fingerprint: str) -> Envelope:
    """Read what is around the request; raises LineError for a line that is not JSON or lacks a field."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LineError(f"the line is not JSON ({first_line(error)})", code="invalid_json") from None
    if not isinstance(content, dict):
        raise LineError("the line is not a JSON object", code="invalid_json")
    custom_id = content.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError("custom_id is missing: give each line a text of its own", param="custom_id")
    for name, kind in (("method", str), ("url", str), ("body", dict)):
        value = content.get(name)
        if not isinstance(value, kind) or not value:
            raise LineError(f"{name} is missing", param=name, custom_id=custom_id)
    if content["method"] != "POST":
        raise LineError(
            f"method {content['method']!r} is not available: use 'POST'", param="method", custom_id=custom_id
        )
    if content["url"] not in (COMPLETIONS, CHAT):
        raise LineError(
            f"url {content['url']!r} is not available: use {COMPLETIONS} or {CHAT}",
            status=404, param="url", custom_id=custom_id,
        )  # fmt: skip
    key = _digest([fingerprint, custom_id, content["url"], content["body"]])
    return Envelope(custom_id, key, content["url"], content["body"])


def read_request(envelope: Envelope, served: Served) -> BatchRequest:
    """Translate a request; raises LineError if it cannot be answered, with the reason."""
    try:
        return _read_request(envelope, served)
    except LineError as error:
        error.custom_id = envelope.custom_id
        raise
    except UsageError as error:
        raise LineError(str(error), custom_id=envelope.custom_id) from None


def _read_request(envelope: Envelope, served: Served) -> BatchRequest:
    fields, chat = Fields(envelope.body), envelope.url == CHAT
    name = fields.text("model")
    if name is not None and name not in served.names:
        raise LineError(
            f"model {name!r} is not the one that answers, {served.names[0]!r}: name it so or give "
            "--served-model-name",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip
    if chat:
        prompts, max_tokens, echo = [_conversation(fields, served.text)], _chat_tokens(fields), False
    else:
        prompts, echo = _prompts(fields, served), fields.flag("echo")
        max_tokens = fields.integer("max_tokens", _COMPLETION_TOKENS, low=0)
        if max_tokens == 0 and not echo:
            raise LineError("max_tokens is 0, which needs echo", param="max_tokens")
    logprobs = _logprobs(fields, chat)
    choices = fields.integer("n", 1, low=1, high=_MOST_CHOICES)
    temperature = fields.number("temperature", 1.0, low=0, high=2)
    top_p = fields.number("top_p", 1.0, low=0, high=1)
    if top_p == 0:
        raise LineError("top_p is 0: it must be above", param="top_p")
    top_k = max(fields.integer("top_k", 0, low=-1), 0)
    seed = fields.integer("seed", None)
    stops = require_stop_strings(fields.texts("stop"))
    fields.finish()
    stop, requests = served.text.stop_check(stops), []
    own_seed = [served.seed, envelope.custom_id] if seed is None else [seed]
    for number, prompt in enumerate(prompts):
        limit = _limit(prompt, max_tokens, served)
        for choice in range(choices):
            drawn = _digest([own_seed, prompt.tokens, temperature, top_p, top_k, number, choice])
            requests.append(
                Request(
                    prompt.tokens,
                    limit,
                    prompt_logprobs=echo and (logprobs or limit == 0),
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    seed=int(drawn[:15], 16),
                    stop_token_ids=served.text.end_ids,
                    stop=stop,
                )
            )
    return BatchRequest(envelope, prompts, choices, requests, stops, echo, logprobs)


def _prompts(fields: Fields, served: Served) -> list[Prompt]:
    value = fields.take("prompt")
    if value is None:
        raise LineError("prompt is missing", param="prompt")
    several = isinstance(value, list) and value and not _is_id(value[0])
    return [_prompt(item, served) for item in (value if several else [value])]


def _prompt(value: Any, served: Served) -> Prompt:
    text = served.text
    if isinstance(value, str):
        source, ids = utf8(value, "prompt"), text.encode(value)
        prefix = text.start_ids if ids else text.scoring_prefix
        if prefix and ids[: len(prefix)] == prefix:
            prefix = ()
        if not ids and not prefix:
            raise LineError("prompt is empty and the model has no beginning-of-text token", param="prompt")
        return Prompt(ids, prefix, source)
    if not isinstance(value, list) or not value or not all(map(_is_id, value)):
        raise LineError("prompt must be a text, texts, token ids or lists of token ids", param="prompt")
    wrong = next((token for token in value if not 0 <= token < served.vocab_size), None)
    if wrong is not None:
        raise LineError(
            f"prompt has token id {wrong}, the model knows 0 to {served.vocab_size - 1}", param="prompt"
        )
    return Prompt(tuple(value), (), text.join(value))


def _conversation(fields: Fields, text: Text) -> Prompt:
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise LineError("messages is missing or empty", param="messages")
    plain = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    try:
        source = text.chat(plain)
    except UsageError:
        raise
    except Exception as error:  # whatever a model's own template raises
        raise LineError(f"the model's chat template refuses it ({first_line(error)})") from None
    ids = text.encode(source)
    if not ids:
        raise LineError("the model's chat template makes an empty prompt of it", param="messages")
    return Prompt(ids, (), source.encode())


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise LineError(f"{where} has no role", param=where)
    known = {"role", "content", "name"}
    others = [key for key, value in message.items() if key not in known and value not in (None, [])]
    if others:
        raise LineError(f"{where}.{others[0]} is not available: leave it out", param=where)
    content = message.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
            raise LineError(f"{where}.content has parts that are not text", param=where)
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise LineError(f"{where}.content is not a text", param=where)
    utf8(content, where)
    return {key: value for key, value in message.items() if key in known and value is not None} | {
        "content": content
    }


def _chat_tokens(fields: Fields) -> int | None:
    older = fields.integer("max_tokens", None, low=1)
    return fields.integer("max_completion_tokens", older, low=1)


def _logprobs(fields: Fields, chat: bool) -> bool:
    if chat:
        wanted, most = fields.flag("logprobs"), fields.integer("top_logprobs", 0, low=0)
    else:
        count = fields.integer("logprobs", None, low=0)
        wanted, most = count is not None, max((count or 0) - 1, 0)
    if most:
        name, known = ("top_logprobs", "0") if chat else ("logprobs", "0 or 1")
        raise LineError(
            f"{name} asks for tokens that were not chosen; only the chosen token's log-probability is known: "
            f"use {name} {known}",
            param=name,
        )
    return wanted


def _limit(prompt: Prompt, max_tokens: int | None, served: Served) -> int:
    """Most tokens to generate; the last one does not go through the model and needs no position."""
    read, window = len(prompt.tokens), served.max_positions
    left = None if window is None else window - read + 1
    if max_tokens is None:
        max_tokens = served.chat_tokens if left is None else max(1, min(served.chat_tokens, left))
    if left is not None and left < max_tokens:
        raise LineError(
            f"the model's window is {window:,} tokens, {read:,} of the prompt and {max_tokens:,} to generate "
            "do not fit: shorten them",
            code="context_length_exceeded",
        )
    return max_tokens


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def _digest(content: object) -> str:
    """SHA-256 of a JSON-able value, as hexadecimal digits."""
    return hashlib.sha256(_CANONICAL.encode(content).encode()).hexdigest()
