"""What a person sees of a policy while it runs: figures from the engine's reports of its progress.

It knows requests by run entry and the engine's progress; it does not know how it is shown.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.spec.request import CallProgress, Output, Request
from engine.units import format_rate
from harness.progress.eta import TimeLeft

_NOW = 5.0
"""Seconds over which "now" is taken, at least one pass."""


@dataclass(frozen=True)
class View:
    """One look at a policy's call."""

    policy: str
    state: CallProgress
    eta_seconds: float | None
    rate_now: float | None
    rate_mean: float | None
    """Prompt and generated tokens per second: of the last seconds, and since the first pass."""

    entries: Sequence[tuple[str, int, int]] = ()
    """Run entry, requests answered, requests."""

    streams: Mapping[str, float] = field(default_factory=dict)
    """Busy share of each stream over the last seconds."""

    tiers: Sequence[tuple[str, int, int]] = ()
    """Tier, bytes held now, most bytes that it may hold."""

    @property
    def words(self) -> str:
        """The state in one line; a pass over a large model takes minutes, and so does reading one."""
        state = self.state
        if state.loaded < 1:
            return f"{state.loaded:.2f} of the weights read"
        part = f" and {state.pass_done:.2f}" if state.pass_done < 1 else ""
        rate = f", {format_rate(self.rate_mean, 'token')}" if self.rate_mean else ""
        return f"{state.passes}{part} passes{rate}"


class Watch:
    """Makes views of one call.

    Attributes:
        time_left: the estimate, which wants to know of every finished request.
    """

    def __init__(
        self,
        policy: str,
        requests: Sequence[Request],
        slots: int,
        entries: Mapping[str, Sequence[int]],
        answered: Mapping[str, int] | None = None,
    ) -> None:
        """Begin.

        Args:
            entries: by run entry the places of its requests in ``requests``.
            answered: by run entry its requests that were answered before.
        """
        self._policy = policy
        self.time_left = TimeLeft(requests, slots)
        self._of: dict[int, list[str]] = {}
        for entry, places in entries.items():
            for place in places:
                self._of.setdefault(place, []).append(entry)
        before = answered or {}
        self._done = Counter({entry: before.get(entry, 0) for entry in entries})
        self._total = {entry: before.get(entry, 0) + len(places) for entry, places in entries.items()}
        self._past: list[tuple[float, int, Mapping[str, float]]] = []

    def finished(self, index: int, output: Output) -> None:
        """A request is answered."""
        self.time_left.finished(index, output)
        self._done.update(self._of.get(index, ()))

    def view(self, state: CallProgress, now: float | None = None) -> View:
        """Look at the call."""
        now = time.monotonic() if now is None else now
        tokens = state.prompt_tokens + state.generated_tokens
        left = self.time_left.seconds(state)
        self._past.append((now, tokens, state.busy_seconds))
        while len(self._past) > 2 and now - self._past[1][0] >= _NOW:
            self._past.pop(0)
        began, before, busy = self._past[0]
        passed = now - began
        streams = {
            stream: min(1.0, (seconds - busy.get(stream, 0.0)) / passed) if passed > 0 else 0.0
            for stream, seconds in state.busy_seconds.items()
        }
        return View(
            policy=self._policy,
            state=state,
            eta_seconds=state.eta_seconds if left is None else left,
            rate_now=(tokens - before) / passed if passed > 0 and tokens > before else None,
            rate_mean=tokens / state.seconds if tokens and state.seconds else None,
            entries=[(entry, self._done[entry], total) for entry, total in self._total.items()],
            streams=streams,
            tiers=[(tier, held, state.limits.get(tier, 0)) for tier, held in state.held.items()],
        )
