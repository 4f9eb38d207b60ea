"""How long a call to the engine will still take, from the passes so far and the sequences that are left.

A pass costs a fixed time (weights are read once, however many sequences share it) and a time per computed
token; both are fitted to the passes so far. How many passes are left follows from the slots of the block: as
one sequence ends, the next takes its slot. How long answers get is learned from those that are finished.

It knows lengths and times, and nothing of tokens or text. One look costs as much as there are slots, however
many requests wait.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from engine.spec.request import CallProgress, Output, Request


class TimeLeft:
    """An estimate that is updated with every finished request and every pass."""

    def __init__(self, requests: Sequence[Request], slots: int) -> None:
        """Begin with a call.

        Args:
            requests: of the call.
            slots: sequences that share a pass.
        """
        self._limits = [max(1, request.max_new_tokens) for request in requests]
        self._slots = max(1, min(slots, len(requests)))
        self._unfinished = sum(self._limits)  # tokens that may be generated, those that are included
        self._prompts = sum(
            len(r.prompt) if r.max_new_tokens else max(1, len(r.prompt) - 1) for r in requests
        )
        self._used = self._allowed = 0.0  # of those that are finished
        self._passes, self._tokens, self._seconds = 0, 0, 0.0
        self._count = self._sum_t = self._sum_s = self._sum_tt = self._sum_ts = 0.0

    def finished(self, index: int, output: Output) -> None:
        """A request is answered."""
        self._used += max(1, len(output.tokens))
        self._allowed += self._limits[index]
        self._unfinished -= self._limits[index]

    def seconds(self, state: CallProgress) -> float | None:
        """Seconds left; None while no pass is finished. To be called after every pass."""
        if state.passes > self._passes and state.pass_done == 1:
            self._learn(state)
        if not self._count:
            return None
        passes, tokens = self._left(state.in_progress)
        fixed, per_token = self._fit()
        part = state.pass_done if state.pass_done < 1 else 0.0
        prompts = max(0, self._prompts - state.prompt_tokens)
        return max(0.0, fixed * max(0.0, passes - part) + per_token * (tokens + prompts))

    def passes_left(self, state: CallProgress) -> float:
        """Until the last sequence ends: by what the slots hold and what waits for them, or by the longest."""
        return self._left(state.in_progress)[0]

    def _left(self, generated: Mapping[int, int]) -> tuple[float, float]:
        """Passes and generated tokens that are left.

        Args:
            generated: tokens of every sequence that has a slot, by the index of its request.
        """
        part = self._part_generated(sum(generated.values()))
        active = [max(1.0, part * self._limits[index] - done) for index, done in generated.items()]
        waiting = self._unfinished - sum(self._limits[index] for index in generated)
        tokens = sum(active) + part * waiting
        return max([tokens / self._slots, *active]), tokens

    def _part_generated(self, unfinished: int) -> float:
        """Which part of the tokens up to a limit will be generated.

        Short answers finish first, so their mean alone would be too small: what unfinished ones have
        generated counts too, as in an estimate of lifetimes with censored data.
        """
        return min(1.0, (self._used + unfinished + self._slots) / (self._allowed + self._slots))

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
