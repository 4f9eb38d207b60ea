"""Finished answers on disk, one JSON line each, so that a killed suite loses at most the pass in flight.

It knows outputs and their keys; what a key is made of is its caller's matter.

A line: ``{"key", "prompt_tokens", "tokens", "logprobs", "prompt_logprobs", "finish_reason",
"block_size", "block_seconds", "prompt_greedy"}``, the last absent from older journals. "block_size" and
"block_seconds" are times; everything else depends only on what the key stands for. The file is only
ever appended to. A process killed in the middle of a write leaves a torn last line, which is cut off
when the journal is next opened.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from engine.errors import storage_errors
from engine.spec.request import Output

_SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class Answer:
    """What the journal holds of one request."""

    output: Output

    prompt_tokens: int
    """Length of the prompt that was computed, with what was put in front of it."""

    @property
    def seconds(self) -> float:
        """This request's share of the passes it took part in."""
        return self.output.block_seconds / self.output.block_size


class Journal:
    """The answers of one policy in one suite.

    Attributes:
        answers: all answers by key, those read at the start and those added since.
        damaged: lines that could not be read and were ignored; their requests count as unanswered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.damaged = 0
        self._file: BinaryIO | None = None
        self._synced = time.monotonic()
        if path.exists():
            with storage_errors(path):
                self._read()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, key: str, answer: Answer) -> None:
        """Append one answer; it survives the death of this process at once and that of the machine
        after a second.

        Raises:
            StorageError: if it cannot be written.
        """
        output = answer.output
        line = {
            "key": key,
            "prompt_tokens": answer.prompt_tokens,
            "tokens": output.tokens,
            "logprobs": output.logprobs,
            "prompt_logprobs": output.prompt_logprobs,
            "finish_reason": output.finish_reason,
            "block_size": output.block_size,
            "block_seconds": output.block_seconds,
            "prompt_greedy": None if output.prompt_greedy is None else list(map(int, output.prompt_greedy)),
        }
        with storage_errors(self.path, "write"):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab")
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        self.answers[key] = answer

    def close(self) -> None:
        """Flush to the disk and close."""
        if self._file is not None:
            self._sync()
            self._file.close()
            self._file = None

    def _sync(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _read(self) -> None:
        with self.path.open("rb+") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    break
                end += len(line)
                try:
                    key, answer = _parse(line)
                except (ValueError, KeyError, TypeError):
                    self.damaged += 1
                    continue
                self.answers[key] = answer


def _parse(line: bytes) -> tuple[str, Answer]:
    record = json.loads(line)
    prompt_logprobs, prompt_greedy = record["prompt_logprobs"], record.get("prompt_greedy")
    output = Output(
        tokens=tuple(record["tokens"]),
        logprobs=tuple(record["logprobs"]),
        prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
        finish_reason=record["finish_reason"],
        block_size=float(record["block_size"]),
        block_seconds=float(record["block_seconds"]),
        prompt_greedy=None if prompt_greedy is None else tuple(map(bool, prompt_greedy)),
    )
    return str(record["key"]), Answer(output, int(record["prompt_tokens"]))
