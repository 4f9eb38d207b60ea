"""The real engine, which remembers how often it was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.engine import Engine
from engine.spec.request import Output, Request


class CountingEngine(Engine):
    """Counts over all instances; tests clear ``calls`` before they begin."""

    calls: list[int] = []
    """Requests of each call, newest last."""

    def answer(self, requests: Sequence[Request], *args: Any, **callbacks: Any) -> list[Output]:
        """Answer, and remember."""
        self.calls.append(len(requests))
        return super().answer(requests, *args, **callbacks)
