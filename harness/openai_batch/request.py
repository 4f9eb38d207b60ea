"""One line of a batch file (OpenAI's format) as requests to the engine.

It knows the format of a line and the tokenizer, and nothing of files, of answers or of the engine.

A line is ``{"custom_id", "method": "POST", "url", "body"}``. What a body says is either done or
refused with a clear reason; nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import UsageError
from engine.files.documents import DocumentError, parse_json
from engine.spec.request import LogitRules, Request
from harness.openai_batch.fields import LineError, read_fields, wrong
from harness.openai_batch.grammar import Grammar, Grammars
from harness.openai_batch.prompts import MOST_TOKENS, Prompt, PromptReader
from harness.tokenizer import require_stop_strings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

_MOST_ANSWERS = 8192
"""Of one line: prompts times choices."""

_MOST_COMMAS = 2 * MOST_TOKENS
"""Of one line, before it is parsed: an empty list takes 3 bytes of a line and 70 of memory."""


@dataclass(frozen=True)
class Served:
    """Who answers, as far as a line has to know."""

    prompts: PromptReader
    grammars: Grammars
    names: Sequence[str]
    """What the ``model`` of a body may be; the first one is written into answers."""

    seed: int
    """The user's; seeds of requests that bring none are derived from it."""

    chat_tokens: int
    """Most generated tokens of a chat request that does not say."""

    fingerprint: str
    """Identifies all that answers depend on besides the line itself."""

    system_fingerprint: str = ""
    """The same as answers show it, see `harness.openai_batch.response.shown_fingerprint`."""

    reproducible: bool = False
    """Whether an answer says nothing of when, and beside which others, it was answered."""


@dataclass(frozen=True)
class Envelope:
    """A line whose request has not been looked at yet."""

    custom_id: str
    key: str
    """Digest of everything that the answer depends on."""

    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What an answer shows besides the generated text."""

    echo: bool
    """The prompt, before the answer."""

    logprobs: int | None
    """Log-probabilities, with this many of the most probable tokens; None for none."""

    prompt_logprobs: int | None
    """The same of the prompt, in a list of its own."""

    special: bool = False
    """Special tokens in the middle of the generated text."""

    @classmethod
    def of(cls, fields: Mapping[str, Any], chat: bool) -> Wanted:
        """What the fields of a body ask for."""
        count = fields["logprobs"]
        if chat:
            count = fields["top_logprobs"] if count else None
        special = not fields["skip_special_tokens"]
        return cls(not chat and fields["echo"], count, fields["prompt_logprobs"], special)

    @property
    def of_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are wanted at all."""
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)

    @property
    def top(self) -> int:
        """Most probable tokens beside each generated one."""
        return self.logprobs or 0

    @property
    def prompt_top(self) -> int:
        """Most probable tokens beside each of the prompt; a rank is known only with one."""
        listed = 0 if self.prompt_logprobs is None else max(1, self.prompt_logprobs)
        return max(listed, self.top if self.echo else 0)


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
    wanted: Wanted
    grammar: Grammar | None = None
    """What the answers have to follow; None for free text."""

    line: int = 0
    """Its number in the input, from 1."""


def read_envelope(line: bytes, fingerprint: str) -> Envelope:
    """Read what is around the request; raises LineError for a line that is not JSON or lacks a field."""
    if line.count(b",") > _MOST_COMMAS:
        raise LineError(f"the line has more than {_MOST_COMMAS:,} values: split it", status=413)
    try:
        content = parse_json(line, finite=False, surrogates=True)
    except DocumentError as error:
        raise LineError(f"the line {error}", code="invalid_json") from None
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
            f"method {content['method'][:60]!r} is not available: use 'POST'",
            param="method",
            custom_id=custom_id,
        )
    if content["url"] not in (COMPLETIONS, CHAT):
        raise LineError(
            f"url {content['url'][:60]!r} is not available: use {COMPLETIONS} or {CHAT}",
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
    chat = envelope.url == CHAT
    fields = read_fields(envelope.body, chat)
    name = fields["model"]
    if name is not None and name not in served.names:
        raise LineError(
            f"model {name[:60]!r} is not the one that answers, {served.names[0]!r}: name it so or give "
            "--served-model-name",
            status=404, param="model", code="model_not_found",
        )  # fmt: skip
    _check_together(fields, chat, served)
    grammar = served.grammars.read(fields["response_format"])
    if grammar and fields["ignore_eos"]:
        raise LineError("response_format ends with the model's own end, which ignore_eos ignores")
    wanted = Wanted.of(fields, chat)
    reader = served.prompts
    if chat:
        prompts = [reader.conversation(fields["messages"], fields)]
    else:
        prompts = reader.prompts(fields["prompt"])
    _check_count(len(prompts), fields["n"])
    requests = []
    for number, prompt in enumerate(prompts):
        limit = _limit(prompt, fields, chat, served)
        plain = _request(prompt, limit, fields, wanted, served)
        if grammar:
            plain = replace(plain, rules=replace(plain.rules, guide=grammar))
        own_seed = [served.seed, envelope.custom_id] if fields["seed"] is None else [fields["seed"]]
        for choice in range(fields["n"]):
            drawn = _digest(
                [own_seed, prompt.tokens, plain.temperature, plain.top_p, plain.top_k, number, choice]
            )
            requests.append(replace(plain, seed=int(drawn[:15], 16)))
    return BatchRequest(
        envelope, prompts, fields["n"], requests, require_stop_strings(fields["stop"]), wanted, grammar
    )


def _request(
    prompt: Prompt, limit: int, fields: Mapping[str, Any], wanted: Wanted, served: Served
) -> Request:
    """A request for one choice of a prompt, without its seed."""
    ends = frozenset() if fields["ignore_eos"] else served.prompts.text.end_ids
    return Request(
        prompt.tokens,
        limit,
        prompt_logprobs=wanted.of_prompt or (wanted.echo and limit == 0),
        top_logprobs=wanted.top,
        prompt_top_logprobs=wanted.prompt_top,
        temperature=float(fields["temperature"]),
        top_p=float(fields["top_p"]),
        top_k=max(fields["top_k"], 0),
        rules=LogitRules(
            min_tokens=fields["min_tokens"],
            bias=tuple((int(token), float(bias)) for token, bias in sorted(fields["logit_bias"].items())),
            repetition_penalty=float(fields["repetition_penalty"]),
            frequency_penalty=float(fields["frequency_penalty"]),
            presence_penalty=float(fields["presence_penalty"]),
            min_p=float(fields["min_p"]),
        ),
        stop_token_ids=ends | frozenset(fields["stop_token_ids"]),
        stop=served.prompts.text.stop_check(
            require_stop_strings(fields["stop"]), prompt.tokens, skip_special=not wanted.special
        ),
    )


def _check_together(fields: Mapping[str, Any], chat: bool, served: Served) -> None:
    """Refuse values that do not go together or that the model does not know."""
    ids = (*fields["stop_token_ids"], *map(int, fields["logit_bias"]))
    most = served.prompts.vocab_size - 1
    unknown = next((token for token in ids if not 0 <= token <= most), None)
    if unknown is not None:
        name = "stop_token_ids" if unknown in fields["stop_token_ids"] else "logit_bias"
        raise wrong(name, unknown, f"is no token id of the model: give ids of 0 to {most}")
    if chat and fields["top_logprobs"] and not fields["logprobs"]:
        raise wrong("top_logprobs", fields["top_logprobs"], "needs logprobs=true")
    if fields["max_tokens"] == 0 and not (fields["echo"] or fields["prompt_logprobs"] is not None):
        raise LineError("max_tokens is 0, which needs echo or prompt_logprobs", param="max_tokens")


def _check_count(prompts: int, choices: int) -> None:
    if prompts * choices > _MOST_ANSWERS:
        raise LineError(
            f"{prompts:,} prompts with n={choices} are {prompts * choices:,} answers, more than "
            f"{_MOST_ANSWERS:,}: split the line",
            param="n",
        )


def _limit(prompt: Prompt, fields: Mapping[str, Any], chat: bool, served: Served) -> int:
    """Most tokens to generate; the last one does not go through the model and needs no position."""
    asked = (fields["max_completion_tokens"] or fields["max_tokens"]) if chat else fields["max_tokens"]
    read, window = len(prompt.tokens), served.prompts.max_positions
    left = None if window is None else window - read + 1
    if asked is None:
        asked = served.chat_tokens if left is None else max(1, min(served.chat_tokens, left))
    if left is not None and left < asked:
        raise LineError(
            f"the model's window is {window:,} tokens, {read:,} of the prompt and {asked:,} to generate "
            "do not fit: shorten them",
            code="context_length_exceeded",
        )
    if fields["min_tokens"] > asked:
        raise wrong("min_tokens", fields["min_tokens"], f"is more than the {asked} tokens to generate")
    return int(asked)


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def _digest(content: object) -> str:
    """SHA-256 of a JSON-able value, as hexadecimal digits."""
    return hashlib.sha256(_CANONICAL.encode(content).encode()).hexdigest()
