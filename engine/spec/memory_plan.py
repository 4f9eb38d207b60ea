"""The plan of a run's memory: where everything is kept, and its peak bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.spec.hardware import Tier
from engine.spec.kv_layout import KVSlot
from engine.spec.layout import LAST_STAGE_BUFFER, KeptWeight


@dataclass(frozen=True)
class StatePlan:
    """Where recurrent and convolution state will be kept."""

    slot_tiers: Sequence[Tier] = ()
    """Tier of every slot of the block, for its state."""

    rows: Mapping[Tier, int] = field(default_factory=dict)
    """Most sequences whose state is in a tier at once; no tier without any."""

    buffer: int = 0
    """Bytes of a buffer for one layer's state of a device batch that is kept elsewhere; 0 for none."""

    stage: int = 0
    """Bytes of one of the state's staging buffers; 0 where nothing is staged."""


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything will be kept, and its peak bytes."""

    weights: Mapping[str, KeptWeight]
    """How and where every weight is kept."""

    kv_slot_tiers: Sequence[Tier]
    activation_tiers: Sequence[Tier]
    """Tier of every slot of the block, for its KV cache and its hidden states."""

    tiers: Mapping[Tier, Mapping[str, int]]
    """Bytes per tier and purpose."""

    batch_tokens: int
    """Most packed tokens of one device batch in a pass."""

    kv_buffer: int
    """Bytes that hold what a device batch needs of one layer's KV cache, fresh rows included; 0 for none."""

    stage_buffers: tuple[int, ...]
    """Bytes of each of the `WEIGHT_SLOTS` buffers: of the largest stage that is brought into it."""

    staging: int
    """Bytes of one buffer between the disk and a stage's buffers, see `KeptWeight.staged`; 0 for none."""

    converting: int
    """Bytes of the largest weight that is staged."""

    prefix_stage: int
    """Bytes of a buffer that holds one layer of the shared prefixes in use; 0 where they are near."""

    kv_slot: KVSlot
    """How a slot on disk is laid out; its capacity is that of the largest sequence."""

    kv_disk_slots: int
    """Most sequences whose KV cache is on disk at once."""

    host_attention: bool
    """Whether decoding attends to the KV cache in host memory where it lies, which is not the device's."""

    host_attention_stage: int
    """Bytes that the queries, fresh rows and results of one device batch take on the host; 0 for none."""

    kv_stage: int
    """Bytes of one of the KV cache's staging buffers; 0 where nothing is staged."""

    computes_packed: bool
    """Whether products and attention are computed straight from packed numbers, whatever their rows."""

    while_loading: Mapping[Tier, int]
    """Bytes of each tier that reading a checkpoint takes at most, beside the weights already in place."""

    reserved: int
    """Bytes of the device tier for what torch allocates by itself: hidden states in flight, temporaries."""

    unified: bool
    """Whether device and host are one memory."""

    state: StatePlan = StatePlan()

    @property
    def kv_moves(self) -> bool:
        """Whether some of the KV cache has to be brought to the device for attention and written back."""
        return self.kv_buffer > 0

    @property
    def head_stays(self) -> bool:
        """Whether the head's weights are brought once, into a buffer of their own, see `stays_in_place`."""
        return self.stage_buffers[LAST_STAGE_BUFFER] > 0

    def total(self, tier: Tier) -> int:
        """Peak bytes in one tier."""
        return sum(self.tiers[tier].values())

    @property
    def together(self) -> int:
        """Peak bytes of device and host, which are one memory on a machine without an accelerator."""
        return self.total(Tier.DEVICE) + self.total(Tier.HOST)
