"""The prompts of a line: texts, token ids or a conversation, as the tokens that the model reads.

A prompt that cannot fit the model's window is refused by its bytes, before it is encoded: an encoder takes
hundreds of bytes of memory for each of a text.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from harness.openai_batch.fields import LineError, is_whole, utf8
from harness.tokenizer import Text

MOST_TOKENS = 1 << 21
"""Prompt tokens of one line, of all its prompts."""

_MOST_PROMPTS = 2048
_MOST_SHRUNK = 4
"""Characters of which a normaliser makes at least one byte, white space apart."""

_ENCODED_AT_ONCE = 1 << 18
"""Characters of a text that are encoded before it is looked whether it is too long."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the tokens of one choice."""

    ids: tuple[int, ...]
    """The prompt's own tokens, without ``prefix``."""

    prefix: tuple[int, ...]
    """Tokens that the tokenizer puts before a text; never part of an answer."""

    source: bytes
    """The prompt as text, UTF-8."""

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """All input tokens of the model; one tuple for all choices."""
        return self.prefix + self.ids if self.prefix else self.ids


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts for one model."""

    text: Text
    vocab_size: int
    max_positions: int | None

    def prompts(self, value: Any) -> list[Prompt]:
        """One or several prompts of a completion; raises LineError."""
        if value is None:
            raise LineError("prompt is missing", param="prompt")
        several = isinstance(value, list) and value and not is_whole(value[0])
        listed, found, tokens = value if several else [value], [], 0
        if len(listed) > _MOST_PROMPTS:
            raise LineError(f"the line has {len(listed):,} prompts, more than {_MOST_PROMPTS:,}: split it")
        for item in listed:
            found.append(self._prompt(item))
            tokens += len(found[-1].tokens)
            if tokens > MOST_TOKENS:
                raise LineError(f"the prompts of the line have more than {MOST_TOKENS:,} tokens: split it")
        return found

    def _prompt(self, value: Any) -> Prompt:
        text = self.text
        if isinstance(value, str):
            source, ids = utf8(value, "prompt"), self.encode(value)
            prefix = text.start_ids if ids else text.scoring_prefix
            if prefix and ids[: len(prefix)] == prefix:
                prefix = ()
            if not ids and not prefix:
                raise LineError(
                    "prompt is empty and the model has no beginning-of-text token", param="prompt"
                )
            return Prompt(ids, prefix, source)
        if not isinstance(value, list) or not value or not all(map(is_whole, value)):
            raise LineError("prompt must be a text, texts, token ids or lists of token ids", param="prompt")
        self._refuse_more(len(value))
        wrong = next((token for token in value if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise LineError(
                f"prompt has token id {wrong}, the model knows 0 to {self.vocab_size - 1}", param="prompt"
            )
        return Prompt(tuple(value), (), text.join(value))

    def conversation(self, messages: Any, fields: Mapping[str, Any]) -> Prompt:
        """A conversation in the tokenizer's own chat format; raises LineError."""
        if not isinstance(messages, list) or not messages:
            raise LineError("messages is missing or empty", param="messages")
        plain = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
        for message in plain:
            self._refuse_long(message["content"])
        source = self.text.chat(plain, **_template_values(fields))
        ids = self.encode(source)
        if not ids:
            raise LineError("the model's chat template makes an empty prompt of it", param="messages")
        return Prompt(ids, (), utf8(source, "messages"))

    def encode(self, source: str) -> tuple[int, ...]:
        """The ids of a text; raises LineError for one that is far too long, without encoding it whole."""
        self._refuse_long(source)
        if len(source) > _ENCODED_AT_ONCE:
            count = 0
            for start in range(0, len(source), _ENCODED_AT_ONCE):
                count += len(self.text.encode(source[start : start + _ENCODED_AT_ONCE]))
                self._refuse_more(count // 2)  # cuts change counts, but do not double them
        return self.text.encode(source)

    def _refuse_long(self, source: str) -> None:
        if len(source) > self._most_tokens:  # a token is a byte at least
            self._refuse_more(least_bytes(source) // self.text.longest_token)

    def _refuse_more(self, least: int) -> None:
        """Raise LineError for a prompt of that least number of tokens where it is too large."""
        if least > self._most_tokens:
            raise LineError(
                f"the model's window is {self.max_positions or MOST_TOKENS:,} tokens and the prompt has at "
                f"least {least:,}: shorten it",
                code="context_length_exceeded",
            )

    @property
    def _most_tokens(self) -> int:
        """Of a prompt: one more than positions, for where nothing is generated."""
        return MOST_TOKENS if self.max_positions is None else min(self.max_positions + 1, MOST_TOKENS)


def least_bytes(text: str) -> int:
    """Bytes that the tokens of a text stand for at least, whatever its tokenizer normalises before."""
    return (len(text) - sum(map(text.count, " \t\n\r"))) // _MOST_SHRUNK


def _template_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template is given besides the messages; raises LineError."""
    from transformers import PreTrainedTokenizerBase

    own = {"add_generation_prompt", "continue_final_message"}
    values = dict(fields["chat_template_kwargs"])
    taken = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
    for name in values:
        if name in own or (name in taken and name not in ("documents", "tools")):
            raise LineError(
                f"chat_template_kwargs.{name} is not for a template: leave it out"
                + (f", {name} is a field of its own" if name in own else ""),
                param="chat_template_kwargs",
            )
    goes_on, begins = fields["continue_final_message"], fields["add_generation_prompt"]
    if goes_on and begins:
        raise LineError(
            "continue_final_message goes on with the last message, which needs add_generation_prompt=false",
            param="continue_final_message",
        )
    return values | {"add_generation_prompt": begins, "continue_final_message": goes_on}


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise LineError(f"{where} has no role", param=where)
    known = {"role", "content", "name"}
    others = [key for key, value in message.items() if key not in known and value not in (None, [])]
    if others:
        raise LineError(f"{where}.{others[0][:60]} is not available: leave it out", param=where)
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
