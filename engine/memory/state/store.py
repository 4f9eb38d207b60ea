"""The state of all sequences of a run: one record per sequence and layer, in the tier of its slot.

Records near the device are computed with in place. Others are brought, as they are kept, into one of two
buffers before a layer is computed, and written back after it. A shared prefix ends in a snapshot, near the
device, with which the sequences behind it begin.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from engine.memory.staging import StagingPool, aligned_bytes, transfer_through
from engine.memory.state.batch import BatchStates, Snapshot, StateBatch, StateRegion, StateUse, Storage
from engine.memory.storage import Tiers
from engine.spec.hardware import Tier
from engine.spec.layout import STAGE_BUFFERS, STAGING_BUFFERS
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.state_layout import state_layers

Moved = tuple[int, StateBatch]
"""A layer, and the device batch whose records of it are in a buffer."""


class StateStore:
    """All sequences' recurrent and convolution state.

    Attributes:
        placed: bytes of state placed in each tier so far.
        moves: whether some of it has to be brought to the device.
    """

    def __init__(self, spec: ModelSpec, policy: Policy, plan: MemoryPlan, tiers: Tiers) -> None:
        """Allocate all records and buffers, as planned.

        Raises:
            BudgetError: if a tier's budget does not allow it.
            StorageError: if the disk is full.
        """
        self.layers, self._exact = state_layers(spec, policy), state_layers(spec, policy, exact=True)
        self.moves = plan.state.buffer > 0
        self.placed = dict.fromkeys(Tier, 0)
        self._nbytes = sum(layer.nbytes for layer in self.layers)
        self._begins = [0, *accumulate(layer.nbytes for layer in self._exact)]
        self._tiers, self._tier_of = tiers, plan.state.slot_tiers
        self._rows = {tier: list(range(count)) for tier, count in plan.state.rows.items()}  # free ones, heaps
        self._homes: dict[Tier, list[Tensor]] = {}
        for tier, count in plan.state.rows.items():
            if tier is Tier.DISK:
                self._file_begins = [0, *accumulate(count * layer.stride for layer in self.layers)]
                self._file = tiers.file(self._file_begins[-1], "state")
            else:
                self._homes[tier] = [
                    tiers.tensor(tier, (count, layer.nbytes), torch.uint8, "state") for layer in self.layers
                ]
        self._buffers: list[Tensor] = []
        self._moved: list[Moved | None] = [None] * STAGE_BUFFERS
        self._pool: StagingPool | None = None
        if self.moves:
            self._buffers = [
                aligned_bytes(tiers, Tier.DEVICE, plan.state.buffer, "state buffers")
                for _ in range(STAGE_BUFFERS)
            ]
        if plan.state.stage:
            self._pool = StagingPool(tiers, STAGING_BUFFERS, plan.state.stage)

    def allocate(self, slot: int, tokens: int) -> StateRegion | None:
        """A record at every layer for the sequence that takes a slot; None if nothing needs to be kept.

        Args:
            tokens: most tokens after which it is read again.
        """
        if not tokens or not self.layers:
            return None
        tier = self._tier_of[slot]
        self.placed[tier] += self._nbytes
        return StateRegion(tier, heapq.heappop(self._rows[tier]), tokens)

    def free(self, region: StateRegion) -> None:
        """Give back what a sequence held.

        Raises:
            ValueError: if it was given back before.
        """
        rows = self._rows[region.tier]
        if region.row in rows:
            raise ValueError(f"state {region.row} of the {region.tier.value} tier is freed twice")
        heapq.heappush(rows, region.row)

    def snapshot(self) -> Snapshot | None:
        """Allocate for the state at the end of a shared prefix; None where there is no state.

        Raises:
            BudgetError: if the device's budget does not allow it.
        """
        if not self.layers:
            return None
        return Snapshot(self._tiers.tensor(Tier.DEVICE, (self._begins[-1],), torch.uint8, "shared state"))

    def drop(self, snapshot: Snapshot) -> None:
        """Give a snapshot back."""
        self._tiers.free(snapshot.data)

    def batch(self, uses: Sequence[StateUse]) -> StateBatch:
        """The sequences of a device batch, for a pass."""
        return StateBatch(uses if self.layers else (), self._tiers.unified, self._tiers.device)

    def load(self, layer: int, buffer_index: int, batch: StateBatch) -> int:
        """Bring a device batch's records of one layer into one of the two buffers; returns bytes moved."""
        self._moved[buffer_index] = (layer, batch)
        return self._move(layer, buffer_index, [use.has_past for _, use in batch.moved], write=False)

    def store(self, buffer_index: int) -> int:
        """Write back what is in a buffer; returns bytes moved. Nothing of a sequence that ends."""
        moved = self._moved[buffer_index]
        assert moved is not None
        layer, batch = moved
        return self._move(layer, buffer_index, [not use.is_last for _, use in batch.moved], write=True)

    def view(self, layer: int, buffer_index: int, batch: StateBatch) -> BatchStates | None:
        """What recurrent modules need while they compute a device batch at a layer; None without any."""
        if not self.layers or not self.layers[layer].tensors:
            return None

        def records(storage: Storage) -> Tensor:
            if storage is not None:
                return self._homes[storage][layer]
            return self._brought(layer, buffer_index, len(batch.moved))

        def snapshot(kept: Snapshot) -> Tensor:
            return kept.data[self._begins[layer] : self._begins[layer + 1]].unsqueeze(0)

        return BatchStates(batch, self.layers[layer], self._exact[layer], records, snapshot)

    def _brought(self, layer: int, buffer_index: int, count: int) -> Tensor:
        """The records uint8 [count, bytes] in a buffer."""
        stride = self.layers[layer].stride
        return self._buffers[buffer_index][: count * stride].view(count, stride)

    def _move(self, layer: int, buffer_index: int, wanted: Sequence[bool], write: bool) -> int:
        """Copy the wanted records of a buffer from where they are kept, or to it; returns bytes moved."""
        form, moved = self.layers[layer], self._moved[buffer_index]
        assert moved is not None
        if not form.tensors or not any(wanted):
            return 0
        regions = [region for region, _ in moved[1].moved]
        buffer = self._brought(layer, buffer_index, len(regions))
        on_disk: list[tuple[int, Tensor]] = []
        total = 0
        for begin, end in _runs(regions, wanted):
            region, part = regions[begin], buffer[begin:end]
            if region.tier is Tier.DISK:
                on_disk.append((self._file_begins[layer] + region.row * form.stride, part.view(-1)))
                continue
            home = self._homes[region.tier][layer][region.row : region.row + end - begin]
            near = part[:, : form.nbytes]
            target, source = (home, near) if write else (near, home)
            target.copy_(source, non_blocking=True)
            total += home.numel()
        if not on_disk:
            return total
        if self._pool is not None:  # both the disk's link and the device's
            return total + 2 * transfer_through(self._pool, self._file, on_disk, write)
        return total + (self._file.write_many(on_disk) if write else self._file.read_many(on_disk))


def _runs(regions: Sequence[StateRegion], wanted: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Stretches of wanted regions whose records follow each other in one tier."""
    begin = 0
    for index in range(1, len(regions) + 1):
        last = regions[index - 1]
        if (
            index < len(regions)
            and wanted[index] == wanted[index - 1]
            and (regions[index].tier, regions[index].row) == (last.tier, last.row + 1)
        ):
            continue
        if wanted[begin]:
            yield begin, index
        begin = index
