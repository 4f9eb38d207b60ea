"""What recurrent state costs, and links of any kind: seconds as linear forms in the placement's fractions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from engine.plan.simulation.linear import LinearForm
from engine.plan.workload import BatchWork
from engine.spec.hardware import Tier
from engine.spec.layout import is_near
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.spec.rates import Resource
from engine.spec.state_layout import state_layers

Phase = Mapping[Resource, LinearForm]
"""What goes on at once; it ends when every resource is done."""

Phases = Sequence[Phase]
"""One after the other, within one step."""

_STATE_WALKS = 6
"""How often a step of a recurrence reads or writes the whole state."""

_STATE_FLOPS = 8
"""Operations per value of the state and token of a prompt."""

_ENDS = {
    Resource.DISK_READ: (Tier.DISK, Tier.HOST),
    Resource.DISK_WRITE: (Tier.HOST, Tier.DISK),
    Resource.TO_DEVICE: (Tier.HOST, Tier.DEVICE),
    Resource.TO_HOST: (Tier.DEVICE, Tier.HOST),
}
"""From where to where a link goes."""


class StateCosts:
    """Costs of moving and of computing state, and what links cost."""

    def __init__(self, profile: HardwareProfile, spec: ModelSpec, policy: Policy) -> None:
        self.profile, self.spec, self.policy = profile, spec, policy

    def latency(self, resource: Resource) -> float:
        """Seconds of the first byte of a step that uses a link."""
        return self.profile.link(*_ENDS[resource]).latency if resource in _ENDS else 0.0

    def move_state(self, work: BatchWork, into: bool) -> Phases:
        """The state of sequences whose state is offloaded: of all that have a past, or back of all."""
        count = work.kept if not into else min(work.decodes, work.kept)
        nbytes = count * self._state_bytes
        disk = Resource.DISK_READ if into else Resource.DISK_WRITE
        link = Resource.TO_DEVICE if into else Resource.TO_HOST
        moved = dict.fromkeys(
            self._offload_tiers, count * self.profile.overheads.per_moved if nbytes else 0.0
        )
        cross = {tier: self._crossing(link, nbytes) for tier in self._offload_tiers}
        there = nbytes / self._bandwidth(disk, nbytes) if nbytes else 0.0
        return [
            {self._cpu_resource: LinearForm.of("state", moved)},
            {
                disk: LinearForm.of("state", {Tier.DISK: there}),
                link: LinearForm.of("state", cross),
            },
        ]

    def recurrence(self, stage: int, work: BatchWork) -> float:
        """Seconds of a layer's recurrences beside its products: memory is walked over, or a prompt's chunks
        are multiplied."""
        if not self.spec.has_state or not self.spec.states[stage - 1]:
            return 0.0
        nbytes = sum(tensor.nbytes for tensor in self.spec.states[stage - 1])
        seconds = _STATE_WALKS * work.decodes * nbytes / self.profile.memory_bandwidth[Tier.DEVICE]
        if work.prompts:
            flops = _STATE_FLOPS * work.prompt_tokens * nbytes / self.spec.compute_bytes
            seconds += flops / self.profile.attention.prompt.at(work.prompt_tokens / work.prompts)
        return seconds

    @cached_property
    def _state_bytes(self) -> float:
        """Bytes of one sequence's state at a layer, as it is kept, mean over the layers."""
        layers = state_layers(self.spec, self.policy)
        return sum(layer.nbytes for layer in layers) / max(len(layers), 1)

    @cached_property
    def _offload_tiers(self) -> tuple[Tier, ...]:
        """Tiers that the device does not read where they are."""
        return tuple(tier for tier in Tier if not is_near(tier, self.profile.unified))

    @property
    def _cpu_resource(self) -> Resource:
        """The processor that copies within host memory and walks over sequences."""
        return Resource.COMPUTE if self.profile.unified else Resource.HOST

    def _crossing(self, link: Resource, nbytes: float) -> float:
        """Seconds on the link between host and device; none where they are one memory."""
        return nbytes / self._bandwidth(link, nbytes) if nbytes > 0 and not self.profile.unified else 0.0

    def _bandwidth(self, link: Resource, nbytes: float) -> float:
        if not self.profile.capacity[Tier.DISK] and Tier.DISK in _ENDS[link]:
            return 1.0  # nothing is placed there, whatever it would take
        return self.profile.link(*_ENDS[link]).bandwidth.at(max(nbytes, 1))
