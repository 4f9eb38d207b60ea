"""Linear forms in a placement's fractions: their value is an estimate, their coefficients a row of the LP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.spec.hardware import Tier


class Share(NamedTuple):
    """One of the twelve fractions: of one kind of tensor in one tier."""

    kind: str
    """``weights``, ``kv``, ``state`` or ``activations``, as a policy calls them."""

    tier: Tier


KINDS = ("weights", "kv", "state", "activations")
SHARES = tuple(Share(kind, tier) for kind in KINDS for tier in Tier)

Fractions = Mapping[Share, float]


@dataclass(frozen=True)
class LinearForm:
    """``constant + sum of coefficient x fraction``."""

    constant: float = 0.0
    coefficients: Mapping[Share, float] = field(default_factory=dict)

    def __add__(self, other: LinearForm) -> LinearForm:
        merged = dict(self.coefficients)
        for share, value in other.coefficients.items():
            merged[share] = merged.get(share, 0.0) + value
        return LinearForm(self.constant + other.constant, merged)

    def __mul__(self, factor: float) -> LinearForm:
        return LinearForm(
            self.constant * factor, {share: v * factor for share, v in self.coefficients.items()}
        )

    def __bool__(self) -> bool:
        return bool(self.constant) or any(self.coefficients.values())

    def at(self, fractions: Fractions) -> float:
        """Its value."""
        return self.constant + sum(value * fractions[share] for share, value in self.coefficients.items())

    @classmethod
    def of(cls, kind: str, per_tier: Mapping[Tier, float], constant: float = 0.0) -> LinearForm:
        """A form in the fractions of one kind."""
        return cls(constant, {Share(kind, tier): value for tier, value in per_tier.items() if value})
