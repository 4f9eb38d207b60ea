"""Progress of long steps on standard error: one line that changes on a terminal, sparse lines elsewhere.

It knows nothing of what is counted; the live picture of a run is `harness.progress.dashboard`'s.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from engine.spec.request import CallProgress
from engine.units import format_rate, format_seconds
from harness.escape import plain
from harness.progress.view import View

_TERMINAL_INTERVAL = 0.1
_PLAIN_INTERVAL = 5.0


class Progress:
    """Writes messages and the state of one counted step at a time.

    It keeps the stream that was standard error when it was made, so that it stays visible while the
    output of third parties is redirected into a log file.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._shown = 0  # characters of the live line
        self._label = ""
        self._total = 0
        self._began = self._printed = 0.0

    def say(self, message: str) -> None:
        """Write a line that stays."""
        self._erase()
        print(plain(message), file=self._stream, flush=True)

    def begin(self, label: str, total: int) -> None:
        """Start a step of ``total`` items."""
        self._label, self._total = label, total
        self._began, self._printed = time.monotonic(), float("-inf")
        if self._live:
            self.update(0)
        else:
            self._printed = self._began  # a step shorter than the interval prints its last line only

    def update(self, done: int, detail: str = "", eta_seconds: float | None = None) -> None:
        """Show that ``done`` items are done; without ``eta_seconds`` it is extrapolated."""
        now = time.monotonic()
        if now - self._printed < (_TERMINAL_INTERVAL if self._live else _PLAIN_INTERVAL):
            return
        self._printed = now
        if eta_seconds is None and done:
            eta_seconds = (now - self._began) / done * (self._total - done)
        line = f"{self._label}: {done}/{self._total}{f', {detail}' if detail else ''}"
        if eta_seconds is not None and done < self._total:
            line += f", {format_seconds(eta_seconds)} left"
        self._write(line)

    def follow(self, state: CallProgress) -> None:
        """Show how far a call to the engine is whose requests are the items."""
        self.update(state.finished, rate_of(state), state.eta_seconds)

    def show(self, view: View) -> None:
        """Show how far the engine is with a policy's requests."""
        self.update(view.state.finished, view.words, view.eta_seconds)

    def close(self) -> None:
        """Leave the terminal as it was, also after an interruption."""

    def end(self, detail: str = "") -> None:
        """Finish the step with a line that stays."""
        seconds = format_seconds(time.monotonic() - self._began)
        self.say(f"{self._label}: {self._total} in {seconds}{f', {detail}' if detail else ''}")

    def _write(self, line: str) -> None:
        line = plain(line)
        if not self._live:
            print(line, file=self._stream, flush=True)
            return
        self._stream.write("\r" + line.ljust(self._shown))
        self._stream.flush()
        self._shown = len(line)

    def _erase(self) -> None:
        if self._live and self._shown:
            self._stream.write("\r" + " " * self._shown + "\r")
            self._shown = 0


class Quiet(Progress):
    """Says nothing but what a user asked to be told: warnings and errors go their own ways."""

    def say(self, message: str) -> None:
        """Nothing."""

    def _write(self, line: str) -> None:
        """Nothing."""


def rate_of(state: CallProgress) -> str:
    """Prompt and generated tokens per second of a call to the engine so far; empty at its beginning."""
    tokens = state.prompt_tokens + state.generated_tokens
    return format_rate(tokens / state.seconds, "token") if state.seconds else ""
