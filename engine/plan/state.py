"""How many bytes recurrent and convolution state takes in each tier, and the buffers that bring it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.plan.placement import place_slots
from engine.spec.hardware import Tier
from engine.spec.layout import ALIGNMENT, STAGE_BUFFERS, STAGING_BUFFERS, STATE_STAGE, is_near
from engine.spec.memory_plan import StatePlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.state_layout import StateLayer, state_layers


@dataclass(frozen=True)
class StateDraft:
    """The state of a run: what is kept, for how many sequences and shared prefixes."""

    spec: ModelSpec
    policy: Policy
    unified: bool
    kept: int
    """Requests whose state is read again after a pass."""

    prefixes: int
    """Shared prefixes that may be kept at once."""

    def plan(self) -> StatePlan:
        """Where it is kept."""
        if not self.spec.has_state:
            return StatePlan()
        slots = place_slots(self.policy, self.policy.state)
        rows = {tier: min(slots.count(tier), self.kept) for tier in Tier if tier in slots and self.kept}
        most, size = 0, self.policy.device_batch
        for start in range(0, len(slots), size):
            most = max(most, sum(not is_near(tier, self.unified) for tier in slots[start : start + size]))
        moved = min(most, self.kept)
        buffer = ALIGNMENT + moved * max(layer.stride for layer in self._layers) if moved else 0
        stage = ALIGNMENT + min(STATE_STAGE, buffer) if Tier.DISK in rows and not self.unified else 0
        return StatePlan(slots, rows, buffer, stage)

    def uses(self, plan: StatePlan) -> Iterator[tuple[Tier, str, int]]:
        """Its bytes, by tier and purpose."""
        for tier, rows in plan.rows.items():
            sizes = (layer.stride if tier is Tier.DISK else layer.nbytes for layer in self._layers)
            yield tier, "state", rows * sum(sizes)
        yield Tier.DEVICE, "state buffers", STAGE_BUFFERS * plan.buffer
        yield Tier.HOST, "staging", STAGING_BUFFERS * plan.stage
        if self.spec.has_state:
            exact = state_layers(self.spec, self.policy, exact=True)
            yield Tier.DEVICE, "shared state", self.prefixes * sum(layer.nbytes for layer in exact)

    @property
    def _layers(self) -> Sequence[StateLayer]:
        return state_layers(self.spec, self.policy)


def state_workspace(spec: ModelSpec, policy: Policy) -> int:
    """Bytes of recurrent modules' temporaries, and of a device batch's state unpacked or gathered."""
    exact = (layer.nbytes for layer in state_layers(spec, policy, exact=True))
    chunk, each = spec.state_workspace
    return max(chunk, policy.device_batch * each) + 2 * policy.device_batch * max(exact, default=0)
