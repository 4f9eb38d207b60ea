"""Names the memory that is too small where no policy fits, and how much of it would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engine.errors import InfeasibleError
from engine.spec.hardware import Tier
from engine.units import GIB, format_bytes

_AMPLE = 1 << 60

Fits = Callable[[Tier, int], bool]
"""Whether something would fit if a tier had this many bytes."""


def too_small(limits: Mapping[Tier, int], unified: bool, model: str, fits: Fits) -> InfeasibleError:
    """Name the one tier without whose limit something would fit.

    Args:
        unified: whether device and host are one memory.
    """
    tiers = [tier for tier in (Tier.DISK, Tier.HOST, Tier.DEVICE) if not (unified and tier is Tier.DEVICE)]
    for tier in tiers:
        if fits(tier, _AMPLE):
            needed, available = format_bytes(_least(limits[tier], tier, fits)), format_bytes(limits[tier])
            return InfeasibleError(
                _name(tier),
                f"no policy fits: even the smallest block needs about {needed} of {_name(tier)}, which has "
                f"{available}: raise it, or allow more compression",
            )
    names = " and ".join(map(_name, reversed(tiers)))
    return InfeasibleError(
        names, f"no policy fits: {names} are too small together for {model}: raise two of them"
    )


def _least(limit: int, tier: Tier, fits: Fits) -> int:
    """Bytes of one tier that would do, to about a hundredth."""
    low, high = limit, max(2 * limit, GIB)
    while high < _AMPLE and not fits(tier, high):
        low, high = high, min(2 * high, _AMPLE)
    while high - low > high // 128:
        middle = (low + high) // 2
        if fits(tier, middle):
            high = middle
        else:
            low = middle
    return high


def _name(tier: Tier) -> str:
    return "disk" if tier is Tier.DISK else f"{tier.value} memory"
