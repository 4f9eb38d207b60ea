"""From asked fractions to whole tensors and whole slots: what placement is really achieved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.spec.hardware import Tier
from engine.spec.model import ModelSpec
from engine.spec.policy import Placement, Policy


def spread(sizes: Iterable[int], placement: Placement) -> list[Tier]:
    """Give each item a tier so that every prefix of the list meets the fractions within one item.

    Each item goes to the tier that is furthest behind its share of what has been placed so far
    (error diffusion), so neighbours differ and every layer is close to the whole model's fractions.
    """
    wanted = [(tier, placement.of(tier)) for tier in Tier if placement.of(tier) > 0]
    if len(wanted) == 1:
        return [wanted[0][0] for _ in sizes]
    placed = [0.0] * len(wanted)
    total = 0.0
    tiers = []
    for size in sizes:
        total += size
        behind = [fraction * total - held for (_, fraction), held in zip(wanted, placed, strict=True)]
        chosen = behind.index(max(behind))
        placed[chosen] += size
        tiers.append(wanted[chosen][0])
    return tiers


def place_weights(spec: ModelSpec, placement: Placement) -> dict[str, Tier]:
    """Choose a tier for every stored tensor; the fractions count values, so they hold for any precision."""
    tiers = spread((tensor.numel for tensor in spec.tensors.values()), placement)
    return dict(zip(spec.tensors, tiers, strict=True))


def place_slots(policy: Policy, placement: Placement) -> list[Tier]:
    """A tier for every slot of the block, batch after batch; the sequence that takes the slot inherits it."""
    return spread([1] * policy.block_size, placement)


def achieved(
    sizes: Mapping[str, int] | Sequence[int], tiers: Mapping[str, Tier] | Sequence[Tier]
) -> dict[str, float]:
    """Fractions per tier that a placement of these sizes really gives."""
    keys = list(sizes) if isinstance(sizes, Mapping) else list(range(len(sizes)))
    held = dict.fromkeys(Tier, 0)
    for key in keys:
        held[tiers[key]] += sizes[key]  # type: ignore[index]
    total = sum(held.values()) or 1
    return {tier.value: held[tier] / total for tier in Tier}
