"""The real engine, with a count of its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.engine import Engine
from engine.spec.request import Output, Request


class CountingEngine(Engine):
    """Lets a test see how often `answer` is called, over all instances; tests clear ``calls`` first."""

    calls: list[int] = []
    """Number of requests of each call, newest last."""

    def answer(self, requests: Sequence[Request], *args: Any, **callbacks: Any) -> list[Output]:
        """Answer and count."""
        self.calls.append(len(requests))
        return super().answer(requests, *args, **callbacks)
