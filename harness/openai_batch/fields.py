"""The fields of a request's body: one table says what each may be, what it means and where it is known.

The table is what lines are read by, what is refused by, and what the documentation shows. A field is done,
or may have a value that asks for nothing (its neutral values), or has no effect on an answer; any other is
refused by name. Names and meanings are OpenAI's and vLLM's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import did_you_mean

MOST_TOP_LOGPROBS = 20


class LineError(Exception):
    """A line that cannot be answered.

    Attributes:
        status: what a server would answer, 4xx or 5xx.
        code: a word for programs.
        param: the field that is wrong, if it is one.
        custom_id: of the line, if it has one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        custom_id: str | None = None,
    ) -> None:
        super().__init__(" ".join(message.split()))
        self.status, self.code, self.param, self.custom_id = status, code, param, custom_id


def utf8(value: str, where: str) -> bytes:
    """A text's bytes; raises LineError where it has none."""
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise LineError(f"{where} holds half of a surrogate pair, which is not text", param=where) from None


def wrong(name: str, value: Any, why: str) -> LineError:
    """The error of a field whose value cannot be taken."""
    shown = repr(value)
    return LineError(f"{name}={shown if len(shown) <= 60 else shown[:60] + '...'} {why}", param=name)


def is_whole(value: Any) -> bool:
    """Whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_text(value: Any) -> bool:
    """Whether a JSON value is a text that has bytes."""
    return isinstance(value, str) and utf8(value, "the text") is not None


def _is_list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and len(key) < 10 and is_number(bias) and -100 <= bias <= 100
        for key, bias in value.items()
    )


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "integer": (is_whole, "a whole number"),
    "number": (is_number, "a number"),
    "text": (lambda value: isinstance(value, str), "a text"),
    "texts": (lambda value: is_text(value) or _is_list_of(is_text)(value), "a text or texts"),
    "ids": (_is_list_of(is_whole), "a list of token ids"),
    "bias": (_is_bias, "token ids with numbers from -100 to 100"),
    "object": (lambda value: isinstance(value, dict), "a JSON object"),
    "any": (lambda value: True, ""),
}
"""What a value of a kind must be. "any" is looked at by whoever knows more of it than its kind."""


@dataclass(frozen=True)
class Field:
    """A field that is done."""

    name: str
    kind: str
    """A key of the table of kinds."""

    meaning: str
    """One line for people."""

    default: Any = None
    """What its absence means."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    """Whether ``low`` itself is out of range."""

    completions: bool = True
    chat: bool = True

    @property
    def limits(self) -> str:
        """Its range in words; empty where it has none."""
        if self.low is None:
            return ""
        low = f"{'above' if self.above else 'at least'} {self.low}"
        if self.high is None:
            return low
        return f"{low}, at most {self.high}" if self.above else f"{self.low} to {self.high}"

    def read(self, value: Any) -> Any:
        """A value that was checked; raises LineError."""
        holds, what = _KINDS[self.kind]
        if not holds(value):
            raise wrong(self.name, value, f"must be {what}")
        too_low = self.low is not None and (value <= self.low if self.above else value < self.low)
        if too_low or (self.high is not None and value > self.high):
            raise wrong(self.name, value, f"must be {self.limits}")
        return [value] if self.kind == "texts" and isinstance(value, str) else value


FIELDS = (
    Field("model", "text", "the folder's name, its path or a `--served-model-name`"),
    Field("prompt", "any", "a text, texts, token ids, lists of token ids", chat=False),
    Field("messages", "any", "roles and texts, in the tokenizer's chat template", completions=False),
    Field("max_tokens", "integer", "most tokens to generate; 0 with `echo` only scores", 16, 0, chat=False),
    Field(
        "max_tokens", "integer", "most tokens to generate; absent: `--default-max-tokens` or what the window "
        "leaves", None, 1, completions=False,
    ),
    Field("max_completion_tokens", "integer", "the same, and comes before it", None, 1, completions=False),
    Field("min_tokens", "integer", "tokens before an end or stop string may come", 0, 0),
    Field("n", "integer", "answers per prompt", 1, 1, 128),
    Field("temperature", "number", "0 is greedy", 1.0, 0, 2),
    Field("top_k", "integer", "the k most probable tokens; 0 and -1: all", 0, -1),
    Field("top_p", "number", "the smallest set with this sum of probabilities", 1.0, 0, 1, above=True),
    Field("min_p", "number", "no token less probable than this part of the most probable one", 0.0, 0, 1),
    Field("seed", "integer", "absent: drawn from `--seed` and the `custom_id`"),
    Field("repetition_penalty", "number", "of tokens of prompt and answer", 1.0, 0, above=True),
    Field("presence_penalty", "number", "of tokens of the answer", 0.0, -2, 2),
    Field("frequency_penalty", "number", "the same, for each time that they came", 0.0, -2, 2),
    Field("logit_bias", "bias", "token ids and what is added to their logits, -100 to 100", {}),
    Field("stop", "texts", "strings that end the answer and are no part of it", []),
    Field("stop_token_ids", "ids", "tokens that do the same", []),
    Field("ignore_eos", "flag", "whether the model's own end does not end the answer", False),
    Field("skip_special_tokens", "flag", "whether special tokens are no part of the text", True),
    Field("echo", "flag", "whether the prompt comes before the answer", False, chat=False),
    Field(
        "logprobs", "integer", "log-probabilities, with this many of the most probable tokens", None, 0,
        MOST_TOP_LOGPROBS, chat=False,
    ),
    Field("logprobs", "flag", "log-probabilities", False, completions=False),
    Field(
        "top_logprobs", "integer", "how many of the most probable tokens beside each; needs `logprobs`", 0, 0,
        MOST_TOP_LOGPROBS, completions=False,
    ),
    Field(
        "prompt_logprobs", "integer", "the prompt's log-probabilities, with this many of the most probable "
        "tokens", None, 0, MOST_TOP_LOGPROBS,
    ),
    Field(
        "response_format", "object", "`json_object`, or `json_schema` with a schema; needs the extra "
        "`grammar`", {"type": "text"},
    ),
    Field("chat_template_kwargs", "object", "values for the chat template", {}, completions=False),
    Field("add_generation_prompt", "flag", "whether the model's turn is begun", True, completions=False),
    Field("continue_final_message", "flag", "whether the last message goes on", False, completions=False),
)  # fmt: skip

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "ec_transfer_params": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_embeds": ([],),
    "reasoning_effort": (),
    "repetition_detection": ({},),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "stream": (False,),
    "stream_options": (),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (-1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}
"""Fields that are not available, with the values that ask for nothing."""

CHAT_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"add_special_tokens": (False,), "echo": (False,)}
"""Those that are neutral in a chat alone, in place of the others."""

WITHOUT_EFFECT = (
    "cache_salt", "metadata", "priority", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "request_id", "return_mm_kwargs", "safety_identifier", "service_tier",
    "session_id", "store", "stream_interval", "user",
)  # fmt: skip
"""Fields that say who asks or how a server is to go about it; no answer depends on them."""


def read_fields(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """The values of all fields that are done, defaults where the body has none; null is the same as absent.

    Raises:
        LineError: for the first field that would have to be ignored or is out of range.
    """
    known = {field.name: field for field in FIELDS if (field.chat if chat else field.completions)}
    neutral = {**NEUTRAL, **CHAT_NEUTRAL} if chat else NEUTRAL
    values = {name: field.default for name, field in known.items()}
    for name, value in body.items():
        if value is None or name in WITHOUT_EFFECT:
            continue
        if name in known:
            values[name] = known[name].read(value)
        elif name not in neutral:
            name = name[:60]
            raise LineError(
                f"field {name!r} of the body is not supported{did_you_mean(name, known)}: leave it out",
                param=name, code="unsupported_field",
            )  # fmt: skip
        elif value not in neutral[name]:
            raise wrong(name, value, "is not available: leave it out")
    return values
