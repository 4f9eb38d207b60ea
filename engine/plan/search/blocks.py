"""The search space: blocks of device batches, formats, and what a person asks besides speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from engine.plan.search.rows import Typical
from engine.plan.simulation.cost import CostModel
from engine.spec.hardware import Budgets
from engine.spec.policy import Policy

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 20)
"""Device batches of a block; the paper stays below 20, too."""

LARGEST_BATCH = 512
_TOKENS = (2048, 4096, 8192)


class Compression(StrEnum):
    """The most compression that is allowed."""

    EXACT = "exact"
    EIGHT_BITS = "8bit"
    FOUR_BITS = "4bit"


FORMATS = {
    Compression.EXACT: ("16",),
    Compression.EIGHT_BITS: ("16", "8"),
    Compression.FOUR_BITS: ("16", "4"),
}


_UNLIMITED, _USUAL = Budgets(), Policy()


@dataclass(frozen=True)
class Constraints:
    """What a person asks of a policy besides speed."""

    accuracy: Compression = Compression.EXACT
    disk: bool = True
    """Whether anything may be on disk."""

    block_seconds: float | None = None
    """Most seconds from a block's first pass to its last."""

    weight_formats: tuple[str, ...] | None = None
    kv_formats: tuple[str, ...] | None = None
    """Formats to choose among, instead of those of ``accuracy``."""

    budgets: Budgets = _UNLIMITED
    """Most bytes of each tier; where none is given, all that the machine has."""

    kept: Policy = _USUAL
    """What the policy keeps besides formats, placements and block: calibration, the part of the past that is
    attended to."""


@dataclass(frozen=True)
class Candidate:
    """A block under one choice of formats; placements are not chosen yet."""

    policy: Policy
    cost: CostModel
    """Of the formats, and of where decoding attends."""


Point = tuple[int, int, int, int]
"""Indices of the formats, the device batch's size, the number of device batches, the tokens of a pass."""


@dataclass(frozen=True)
class Space:
    """All blocks under one choice of formats."""

    cost: CostModel
    sizes: Sequence[int]
    typical: Typical

    def tokens(self, size: int) -> list[int]:
        """How many tokens a device batch may have in a pass: prompts at once, or a few at a time."""
        whole = self.sizes[size] * max(1, round(self.typical.prompt))
        return sorted(
            {max(min(tokens, whole), self.typical.longest.computed) for tokens in (*_TOKENS, whole)}
        )

    def holds(self, size: int, batches: int, tokens: int) -> bool:
        """Whether there is such a block, none larger than the workload by a device batch or more."""
        if not (0 <= size < len(self.sizes) and 0 <= batches < len(BATCHES)):
            return False
        fits = self.sizes[size] * (BATCHES[batches] - 1) < self.typical.count
        return fits and 0 <= tokens < len(self.tokens(size))

    def around(self, point: Point) -> list[Point]:
        """The neighbours of a block."""
        number, *place = point
        found = []
        for axis in range(3):
            for step in (-1, 1):
                moved = [*place]
                moved[axis] += step
                if self.holds(*moved):
                    found.append((number, *moved))
        return found  # type: ignore[return-value]

    def candidate(self, size: int, batches: int, tokens: int) -> Candidate:
        """The block itself."""
        policy = replace(
            self.cost.policy,
            device_batch=self.sizes[size],
            num_device_batches=BATCHES[batches],
            max_batch_tokens=self.tokens(size)[tokens],
        )
        return Candidate(policy, self.cost)

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return sum(
            self.holds(size, batches, tokens)
            for size in range(len(self.sizes))
            for batches in range(len(BATCHES))
            for tokens in range(len(_TOKENS) + 1)
        )


def device_batches(most: int) -> list[int]:
    """Sizes of a device batch to choose among: powers of 2, and the largest."""
    sizes = [1]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == most else [*sizes, most]
