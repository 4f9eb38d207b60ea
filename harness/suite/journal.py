"""Finished answers on disk, one JSON line each, so that a killed suite loses at most the pass in flight.

It knows outputs and their keys; what a key is made of is its caller's matter.

A line: ``{"key", "prompt_tokens", "tokens", "logprobs", "prompt_logprobs", "finish_reason",
"block_size", "block_seconds", "prompt_greedy", "crc32"}``. "block_size" and "block_seconds" are times, and so
is the checksum with them; everything else depends only on what the key stands for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from engine.spec.request import FinishReason, Output
from harness.files import JsonLines

_SYNC_SECONDS = 1.0
_ROUNDING = 1e-3
"""By which a log-probability may exceed 0."""


@dataclass(frozen=True)
class Answer:
    """What the journal holds of one request."""

    output: Output

    prompt_tokens: int
    """Input tokens, those that the tokenizer puts before a text included."""

    @property
    def seconds(self) -> float:
        """This request's share of the passes it took part in."""
        return self.output.seconds


class Journal(JsonLines):
    """The answers of one policy in one suite; those of damaged lines count as missing.

    Attributes:
        answers: all answers by key, those read at the start and those added since.
    """

    def __init__(self, path: Path, vocabulary: int | None = None) -> None:
        """Read what is there.

        Args:
            vocabulary: the number of token ids, where it is known.

        Raises:
            StorageError: if the file is there and cannot be used.
        """
        super().__init__(path, _SYNC_SECONDS)
        self.answers: dict[str, Answer] = {}
        self._vocabulary = vocabulary
        self.read(self._take)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def keep(self, key: str, answer: Answer) -> None:
        """Append one answer; it survives the death of this process at once, of the machine after a second.

        Raises:
            StorageError: if it cannot be written.
        """
        output = answer.output
        self.add({
            "key": key,
            "prompt_tokens": answer.prompt_tokens,
            "tokens": output.tokens,
            "logprobs": output.logprobs,
            "prompt_logprobs": output.prompt_logprobs,
            "finish_reason": output.finish_reason,
            "block_size": output.block_size,
            "block_seconds": output.block_seconds,
            "prompt_greedy": None if output.prompt_greedy is None else list(map(int, output.prompt_greedy)),
        })  # fmt: skip
        self.answers[key] = answer

    def _take(self, line: Any) -> None:
        """Take an answer; raises ValueError, KeyError or TypeError for what cannot be one."""
        logprobs, greedy = line["prompt_logprobs"], line["prompt_greedy"]
        output = Output(
            tokens=tuple(line["tokens"]),
            logprobs=tuple(line["logprobs"]),
            prompt_logprobs=None if logprobs is None else tuple(logprobs),
            finish_reason=line["finish_reason"],
            block_size=float(line["block_size"]),
            block_seconds=float(line["block_seconds"]),
            prompt_greedy=None if greedy is None else tuple(map(bool, greedy)),
        )
        read, known, scored = line["prompt_tokens"], self._vocabulary, output.prompt_logprobs
        right = (
            isinstance(line["key"], str),
            type(read) is int and read >= 1,
            set(map(type, output.tokens)) <= {int},
            min(output.tokens, default=0) >= 0,
            known is None or max(output.tokens, default=0) < known,
            _are_logprobs(output.logprobs) and _are_logprobs(scored or ()),
            len(output.logprobs) == len(output.tokens),
            scored is None or len(scored) == read - 1,
            output.prompt_greedy is None or len(output.prompt_greedy) == len(scored or ()),
            output.finish_reason in get_args(FinishReason),
            1 <= output.block_size < math.inf,
            0 <= output.block_seconds < math.inf,
        )
        if not all(right):
            raise ValueError("no answer")
        self.answers[line["key"]] = Answer(output, read)


def _are_logprobs(values: Sequence[float]) -> bool:
    """Whether they are at most 0, but for rounding, or not numbers, as of a system that gives none."""
    return set(map(type, values)) <= {float} and not any(map(_ROUNDING.__lt__, values))
