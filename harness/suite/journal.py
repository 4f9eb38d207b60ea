"""Finished answers on disk, one JSON line each, so that a killed suite loses at most the pass in flight.

It knows outputs and their keys; what a key is made of is its caller's matter.

A line: ``{"key", "prompt_tokens", "tokens", "logprobs", "prompt_logprobs", "finish_reason",
"block_size", "block_seconds", "prompt_greedy"}``. "block_size" and "block_seconds" are times; everything
else depends only on what the key stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.spec.request import Output
from harness.files import JsonLines

_SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class Answer:
    """What the journal holds of one request."""

    output: Output

    prompt_tokens: int
    """Input tokens, those that the tokenizer puts before a text included."""

    @property
    def seconds(self) -> float:
        """This request's share of the passes it took part in."""
        return self.output.block_seconds / self.output.block_size


class Journal(JsonLines):
    """The answers of one policy in one suite; those of damaged lines count as missing.

    Attributes:
        answers: all answers by key, those read at the start and those added since.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, _SYNC_SECONDS)
        self.answers: dict[str, Answer] = {}
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
        self.answers[str(line["key"])] = Answer(output, int(line["prompt_tokens"]))
