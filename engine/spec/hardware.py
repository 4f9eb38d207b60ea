"""Tiers and their budgets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """Where bytes are held, from fastest to largest."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True)
class Budgets:
    """The most bytes that each tier may hold; None means all that the machine has free.

    On a CPU-only machine device and host are one memory: what either tier holds counts against
    ``host`` and ``device`` must stay None.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None

    def of(self, tier: Tier) -> int | None:
        """The budget of one tier in bytes."""
        budget: int | None = getattr(self, tier.value)
        return budget
