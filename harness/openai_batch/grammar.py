"""Grammars that an answer has to follow: JSON, or JSON of a schema, token by token.

The grammar library is llguidance, an optional package; it knows the bytes of every token and no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.errors import first_line
from engine.spec.request import Guide
from harness.openai_batch.fields import LineError
from harness.tokenizer import Text

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MOST_SCHEMA_BYTES = 1 << 20
_OPTIONS = {"whitespace_flexible": False}
"""JSON in one line: else a model that is not sure of the next word may write spaces to the end."""


class Grammar:
    """One answer's grammar, ready to begin anew as often as the answer is computed.

    Attributes:
        problem: why the library gave up, after which only the end was allowed; empty if it did not.
    """

    def __init__(self, tokenizer: LLTokenizer, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        self.problem = ""

    def __call__(self) -> Guide:
        """The grammar at its beginning."""
        from llguidance import LLMatcher

        return _Follower(self, LLMatcher(self._tokenizer, self._text, log_level=0), self._tokenizer)


class _Follower:
    """A grammar in the middle of an answer: see `engine.spec.request.Guide`."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._grammar, self._matcher = grammar, matcher
        ends = sum(1 << token for token in tokenizer.eos_tokens)
        self._end = ends.to_bytes(-(-tokenizer.vocab_size // 8), "little")

    def allowed(self) -> bytes:
        if self._matcher.is_error() or self._matcher.is_stopped():
            return self._end
        found = self._matcher.compute_bitmask()
        if self._matcher.is_error() or not any(found):
            self._grammar.problem = self._grammar.problem or first_line(
                Exception(self._matcher.get_error() or "no token continues it")
            )
            return self._end
        return found

    def accept(self, token: int) -> None:
        if not self._matcher.is_error() and not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """Reads ``response_format`` for one tokenizer; the library is loaded with the first that asks."""

    def __init__(self, text: Text, vocab_size: int) -> None:
        self._text, self._vocab_size = text, vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._checked = lru_cache(maxsize=256)(self._check)

    def read(self, response_format: Mapping[str, Any]) -> Grammar | None:
        """The grammar of an answer; None for free text.

        Raises:
            LineError: for a format, or a schema, that cannot be followed.
        """
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            schema: Any = {"type": "object"}
        elif kind == "json_schema":
            inner = response_format.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, dict) else None
            if not isinstance(schema, dict):
                raise _wrong("json_schema.schema is missing: give a JSON schema")
        else:
            raise _wrong(f"type {kind!r} is not available: use 'text', 'json_object' or 'json_schema'")
        source = json.dumps(schema)
        if len(source) > _MOST_SCHEMA_BYTES:
            raise _wrong(f"the schema has more than {_MOST_SCHEMA_BYTES:,} bytes: shorten it")
        return Grammar(self._library(), self._checked(source))

    def _check(self, source: str) -> str:
        from llguidance import LLMatcher

        tokenizer = self._library()
        try:
            grammar = LLMatcher.grammar_from_json_schema(source, overrides=_OPTIONS)
            problem = LLMatcher.validate_grammar(grammar, tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem and not problem.startswith("WARNING"):
            raise _wrong(f"the schema cannot be followed ({first_line(Exception(problem))})")
        return grammar

    def _library(self) -> LLTokenizer:
        if self._tokenizer is None:
            if not self._text.end_ids:
                raise _wrong("needs a tokenizer with an end-of-text token, which this model lacks")
            try:
                from llguidance import LLTokenizer, TokenizerWrapper
            except ImportError:
                raise _wrong(
                    "needs the package llguidance, which is not installed: pip install 'llguidance>=1.7,<2'"
                ) from None
            ends = sorted(self._text.end_ids)
            self._tokenizer = LLTokenizer(
                TokenizerWrapper(_Vocabulary(self._text, self._vocab_size, ends[0])),
                n_vocab=self._vocab_size, eos_token=ends,
            )  # fmt: skip
        return self._tokenizer


class _Vocabulary:
    """What the library asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, text: Text, size: int, end: int) -> None:
        self.eos_token_id, self._text = end, text
        self.tokens = [text.token_bytes(token) for token in range(size)]
        added = text.tokenizer.added_tokens_decoder.items()
        special = {int(token) for token, one in added if one.special}
        self.special_token_ids = sorted(special | text.end_ids)

    def __call__(self, source: bytes) -> list[int]:
        return list(self._text.encode(source.decode(errors="replace")))


def _wrong(why: str) -> LineError:
    return LineError(f"response_format: {why}", param="response_format")
