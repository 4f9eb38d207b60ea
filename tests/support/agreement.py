"""How close the engine's answers are to those of `transformers`, over all workers of a test run.

It imports no torch, because the process that only distributes tests adds up the workers' figures, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.spec.request import Output, Request

TOLERANCE = 1e-4
"""Largest accepted difference of a log-probability in float32."""


@dataclass(frozen=True)
class Expected:
    """The answer that `transformers` gives to one prompt, which the engine's is compared with."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_logprobs: tuple[float, ...]


@dataclass
class Comparison:
    """The largest difference from `transformers` so far, for the summary after the tests."""

    answers: int = 0
    worst: float = 0.0
    families: set[str] = field(default_factory=set)

    def check(self, family: str, request: Request, output: Output, expected: Expected) -> None:
        """Fail unless the output is the answer of `transformers` to the request."""
        count = request.max_new_tokens
        assert output.tokens == expected.tokens[:count]
        pairs = list(zip(output.logprobs, expected.logprobs[:count], strict=True))
        if request.prompt_logprobs:
            assert output.prompt_logprobs is not None
            pairs += zip(output.prompt_logprobs, expected.prompt_logprobs, strict=True)
        else:
            assert output.prompt_logprobs is None
        worst = max((abs(got - wanted) for got, wanted in pairs), default=0.0)
        assert worst <= TOLERANCE
        self.add({"answers": 1, "worst": worst, "families": [family]})

    def figures(self) -> dict[str, Any]:
        """What a worker sends to the main process: numbers, text and lists only."""
        return {"answers": self.answers, "worst": self.worst, "families": sorted(self.families)}

    def add(self, figures: dict[str, Any]) -> None:
        """Add the figures of one comparison or of a whole worker."""
        self.answers += figures.get("answers", 0)
        self.worst = max(self.worst, figures.get("worst", 0.0))
        self.families.update(figures.get("families", ()))


COMPARISON = Comparison()
"""Sums up every comparison of this process, and of its workers when they end."""
