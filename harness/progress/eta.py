"""How long a call to the engine will still take, from the passes so far and the sequences that are left.

A pass costs a fixed time (weights are read once, however many sequences share it) and a time per computed
token; both are fitted to the passes so far. How many passes are left follows from the slots of the block: as
one sequence ends, the next takes its slot. How long answers get is learned from those that are finished.

It knows lengths and times, and nothing of tokens or text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.spec.request import CallProgress, Output, Request


class TimeLeft:
    """An estimate that is updated with every finished request and every pass."""

    def __init__(self, requests: Sequence[Request], slots: int) -> None:
        """Begin with a call.

        Args:
            requests: of the call, in its order, which is the order in which they are admitted.
            slots: sequences that share a pass.
        """
        self._prompts = [len(request.prompt) for request in requests]
        self._limits = [max(1, request.max_new_tokens) for request in requests]
        self._slots = max(1, min(slots, len(requests)))
        self._admitted = dict.fromkeys(range(self._slots), 0)  # index -> passes done when it was admitted
        self._next = self._slots
        self._waiting_limits = sum(self._limits[self._next :])
        self._waiting_prompts = sum(self._prompts[self._next :])
        self._used = self._allowed = 0.0
        self._passes, self._tokens, self._seconds = 0, 0, 0.0
        self._count = self._sum_t = self._sum_s = self._sum_tt = self._sum_ts = 0.0

    def finished(self, index: int, output: Output) -> None:
        """A request is answered; the next one that waits takes its slot."""
        self._used += max(1, len(output.tokens))
        self._allowed += self._limits[index]
        self._admitted.pop(index, None)
        if self._next < len(self._limits):
            self._admitted[self._next] = self._passes + 1
            self._waiting_limits -= self._limits[self._next]
            self._waiting_prompts -= self._prompts[self._next]
            self._next += 1

    def seconds(self, state: CallProgress) -> float | None:
        """Seconds left; None while no pass is finished. To be called after every pass."""
        if state.passes > self._passes and state.pass_done == 1:
            self._learn(state)
        if not self._count:
            return None
        passes, tokens = self.passes_left(), self._tokens_left()
        fixed, per_token = self._fit()
        part = state.pass_done if state.pass_done < 1 else 0.0
        return max(0.0, fixed * max(0.0, passes - part) + per_token * tokens)

    def passes_left(self) -> float:
        """Until the last sequence ends: by what the slots hold and what waits for them, or by the longest."""
        left = [self._left(index) for index in self._admitted]
        work = sum(left) + self._expected(self._waiting_limits)
        return max([work / self._slots, *left]) if left else 0.0

    def _left(self, index: int) -> float:
        return max(1.0, self._expected(self._limits[index]) - (self._passes - self._admitted[index]))

    def _expected(self, limit: float) -> float:
        """How many of the tokens up to a limit will be generated.

        Short answers finish first, so their mean alone would be too small: what unfinished ones have
        generated counts too, as in an estimate of lifetimes with censored data.
        """
        used = self._used + sum(self._passes - admitted for admitted in self._admitted.values())
        return limit * min(1.0, (used + self._slots) / (self._allowed + self._slots))

    def _tokens_left(self) -> float:
        return (
            self._waiting_prompts
            + self._expected(self._waiting_limits)
            + sum(map(self._left, self._admitted))
        )

    def _learn(self, state: CallProgress) -> None:
        tokens = state.prompt_tokens + state.generated_tokens
        computed, took = tokens - self._tokens, state.seconds - self._seconds
        self._passes, self._tokens, self._seconds = state.passes, tokens, state.seconds
        self._count += 1
        self._sum_t, self._sum_s = self._sum_t + computed, self._sum_s + took
        self._sum_tt, self._sum_ts = self._sum_tt + computed**2, self._sum_ts + computed * took

    def _fit(self) -> tuple[float, float]:
        """Seconds of a pass and of a token: least squares, neither below 0."""
        spread = self._count * self._sum_tt - self._sum_t**2
        per_token = (
            (self._count * self._sum_ts - self._sum_t * self._sum_s) / spread if spread > 1e-9 else 0.0
        )
        fixed = (self._sum_s - per_token * self._sum_t) / self._count
        if per_token < 0 or math.isnan(per_token):
            return self._sum_s / self._count, 0.0
        if fixed < 0:
            return 0.0, self._sum_ts / self._sum_tt
        return fixed, per_token
