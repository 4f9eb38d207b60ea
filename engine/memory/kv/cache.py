"""The KV cache: one region per sequence in the tier of its slot, in the policy's precision.

Regions near the device are attended to in place. Others are copied, as they are kept, into one of two
buffers before a layer is computed, and what the pass adds is written back after it: to disk in whole
units, and until one is full to host memory (`engine.memory.kv.regions`). Attention always sees the fresh
tokens exactly; compression affects later passes (as in FlexGen).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from engine.errors import StorageError
from engine.kernels.backend import kernels_for
from engine.kernels.calls import DecodeTable
from engine.memory.kv.batch import BatchKeyValues, Parts
from engine.memory.kv.host_attention import HostAttender, OnHost
from engine.memory.kv.prefix import PrefixCache
from engine.memory.kv.regions import DiskSlot, LayerPart, Region, past_in_memory
from engine.memory.staging import StagingPool, aligned_bytes, transfer_through
from engine.memory.storage import Tiers
from engine.spec.hardware import Tier
from engine.spec.kv_format import KVFormat
from engine.spec.kv_layout import kv_layers
from engine.spec.layout import ALIGNMENT, IN_MEMORY, STAGE_BUFFERS, STAGING_BUFFERS, aligned, is_near
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.trace import Trace


class KVCache:
    """All sequences' keys and values."""

    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        plan: MemoryPlan,
        tiers: Tiers,
        trace: Trace | None = None,
    ) -> None:
        """Allocate buffers and slots on disk, as planned.

        Args:
            trace: of attention on the host, which then has a stream of its own; None for no such stream.

        Raises:
            BudgetError: if a tier's budget does not allow it.
            StorageError: if the disk is full.
        """
        self.layers = kv_layers(spec, policy)
        self._attends = any(layer.width for layer in self.layers)
        self.form: KVFormat | None = policy.kv_quant
        self.moves = plan.kv_moves or plan.prefix_stage > 0
        self.placed = dict.fromkeys(Tier, 0)
        self._tiers, self._tier_of = tiers, plan.kv_slot_tiers
        self._dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self.kernels = kernels_for(tiers.device)
        self._decodes_at_once = self.kernels.attends_exact(self._dtype) and (
            self.form is None or self.form.token_by_token
        )
        self.prefixes = PrefixCache(self.layers, self.form, self._dtype, tiers, plan, policy.prefix_kv)
        self._moved: list[dict[int, LayerPart]] = [{} for _ in range(STAGE_BUFFERS)]
        self._slots = self._disk_slots(plan)
        self._buffers: list[Tensor] = []
        self._pool: StagingPool | None = None
        self._scratch: Tensor | None = None
        if self.form:
            size = plan.batch_tokens * max(layer.row_bytes for layer in self.layers)
            self._scratch = tiers.tensor(Tier.DEVICE, (size,), torch.uint8, "KV buffers")
        if plan.kv_moves:
            self._buffers = [
                aligned_bytes(tiers, Tier.DEVICE, plan.kv_buffer, "KV buffers") for _ in range(STAGE_BUFFERS)
            ]
        if plan.kv_stage:
            self._pool = StagingPool(tiers, STAGING_BUFFERS, plan.kv_stage)
        self.host: HostAttender | None = None
        if plan.host_attention_stage:
            self.host = HostAttender(tiers, self.form, plan.host_attention_stage, self.commit, trace)

    def close(self) -> None:
        """Wait for the thread that attends on the host to finish its work, and end it."""
        if self.host is not None:
            self.host.close()

    def _disk_slots(self, plan: MemoryPlan) -> list[DiskSlot]:
        """All slots on disk: one file, one tensor of tails."""
        count, layout = plan.kv_disk_slots, plan.kv_slot
        if not count or not self._attends:
            return []
        self._file = self._tiers.file(count * layout.nbytes, "KV cache")
        tails = self._tiers.tensor(Tier.HOST, (count, layout.tail_bytes), torch.uint8, "KV tails")
        return [DiskSlot(layout, index, tail) for index, tail in enumerate(tails)]

    def allocate(self, slot: int, capacity: int, padding: int = 0) -> Region | None:
        """Allocate for the sequence that takes a slot; None if nothing needs to be kept.

        Args:
            capacity: tokens.
            padding: number of its first tokens that are never attended to.

        Raises:
            BudgetError: if the tier's budget does not allow it.
        """
        if not capacity or not self._attends:
            return None
        region = Region(self._tier_of[slot], capacity, self.layers, padding=padding)
        if region.tier is Tier.DISK:
            region.slot = self._slots.pop()
        else:
            region.data = self._tiers.tensor(region.tier, (region.nbytes,), torch.uint8, "KV cache")
        self.placed[region.tier] += region.nbytes
        return region

    def free(self, region: Region) -> None:
        """Give back what a sequence held."""
        if region.slot is not None:
            self._slots.append(region.slot)
        elif region.data is not None:
            self._tiers.free(region.data)
        region.slot = region.data = None

    def load(
        self, layer: int, buffer_index: int, regions: Sequence[Region | None], fresh: Sequence[int]
    ) -> int:
        """Copy a batch's past keys and values of one layer into one of the two buffers; returns bytes moved.

        Args:
            regions: one per sequence of the device batch; None for sequences without a KV cache.
            fresh: tokens that each sequence will add in this pass.
        """
        parts: dict[int, LayerPart] = {}
        on_disk: list[tuple[int, Tensor]] = []
        at = moved = 0
        for index, region in enumerate(regions if self.layers[layer].width else ()):
            if region is None or is_near(region.tier, self._tiers.unified):
                continue
            if self._stays(region):
                continue
            at, parts[index] = self._part(layer, buffer_index, at, region, fresh[index])
            part = parts[index]
            if region.slot is not None and (size := region.slot.layout.written(layer, region.length)):
                on_disk.append((region.slot.begin(layer), part.data[:size]))
            for loose, begin, source in past_in_memory(region, layer):
                target = part.rows.view(-1).view(torch.uint8) if loose else part.data
                target[begin : begin + len(source)].copy_(source, non_blocking=True)
                moved += 0 if self._tiers.unified else len(source)
        self._moved[buffer_index] = parts
        return moved + self._move(on_disk, write=False)

    def _part(
        self, layer: int, buffer_index: int, at: int, region: Region, fresh: int
    ) -> tuple[int, LayerPart]:
        """The part of one sequence in a buffer from offset ``at``: its end, and the part."""
        form, after = self.layers[layer], region.length + fresh
        at = aligned(at, ALIGNMENT if region.slot is not None else IN_MEMORY)
        data_end = at + form.data_bytes(after)
        rows_at, end = at, data_end
        if form.form:
            rows_at = aligned(data_end, IN_MEMORY)
            end = rows_at + (form.loose_tokens(region.length) + fresh) * form.row_bytes
        buffer = self._buffers[buffer_index]
        rows = buffer[rows_at:end].view(self._dtype).view(-1, form.width)
        return end, LayerPart(region, layer, buffer[at:data_end], rows, fresh)

    def store(self, buffer_index: int) -> int:
        """Write back what the computation added in buffer ``buffer_index``; returns bytes moved.

        Nothing is written of a sequence that ends with this pass.
        """
        parts = [part for part in self._moved[buffer_index].values() if not part.is_last]
        self.pack([part for part in parts if part.newly_packed])
        moved = 0
        to_disk: list[tuple[int, Tensor]] = []
        for part in parts:
            form, region, layer = part.form, part.region, part.layer
            begin, end = form.data_bytes(part.past), form.data_bytes(part.past + part.fresh)
            if region.slot is None:
                moved += _keep(region.data_of(layer, begin, end), part.data[begin:end])
            else:
                old = region.slot.layout.written(layer, part.past)
                new = region.slot.layout.written(layer, part.past + part.fresh)
                if new > old:
                    to_disk.append((region.slot.begin(layer) + old, part.data[old:new]))
                kept = max(begin, new)
                tail = region.slot.tail_data(layer, kept - new, end - new)
                moved += _keep(tail, part.data[kept:end])
            if form.form:
                first = part.newly_packed or part.tail  # all that stay move up where older ones were packed
                last = part.tail + part.fresh
                home = [(row - part.newly_packed) * form.row_bytes for row in (first, last)]
                rows = part.rows[first:last].reshape(-1).view(torch.uint8)
                moved += _keep(region.rows(layer, *home), rows)
        return (0 if self._tiers.unified else moved) + self._move(to_disk, write=True)

    def view(
        self, layer: int, buffer_index: int, regions: Sequence[Region | None], fresh: Sequence[int]
    ) -> BatchKeyValues:
        """What attention needs while it computes this batch at this layer."""
        table = self._decode_table(layer, buffer_index, regions, fresh)
        find_parts = partial(self._parts, layer, buffer_index, regions, fresh)
        return BatchKeyValues(self.kernels, self.form, table, find_parts, self.commit)

    def _parts(
        self, layer: int, buffer_index: int, regions: Sequence[Region | None], fresh: Sequence[int]
    ) -> Parts:
        """The sequences of a batch one by one."""
        if not self.layers[layer].width:
            return Parts({}, [], None)
        parts = dict(self._moved[buffer_index]) if self.moves else {}
        in_place: list[LayerPart] = []
        on_host: dict[int, LayerPart] = {}
        start = 0
        for index, (region, count) in enumerate(zip(regions, fresh, strict=True)):
            if region is not None and index not in parts:
                part = self._in_place(region, layer, start, count)
                if self._stays(region):
                    on_host[index] = part
                else:
                    in_place.append(part)
                    parts[index] = part
            start += count
        host = OnHost(self.host, on_host) if self.host is not None and on_host else None
        return Parts(parts, in_place, host)

    def _decode_table(
        self, layer: int, buffer_index: int, regions: Sequence[Region | None], fresh: Sequence[int]
    ) -> DecodeTable | None:
        """Where the past of a batch lies if all its sequences decode in one call; None if they cannot."""
        if not self._decodes_at_once or max(fresh) > 1 or not self.layers[layer].width:
            return None
        some_stay = self.host is not None
        for region in regions:
            if region is None or not region.length or (some_stay and self._stays(region)):
                return None
        form, count = self.layers[layer], len(regions)
        size = form.block_bytes or form.row_bytes
        known = cast(Sequence[Region], regions)
        # Columns and no loop over rows: this runs at every layer of every pass.
        homes = [
            0 if region.data is None else region.addresses[layer] + region.padding * size for region in known
        ]
        lengths = [region.length - region.padding for region in known]
        moved = self._moved[buffer_index] if self.moves else {}
        if self.form is None:
            for index, part in moved.items():
                homes[index] = part.rows.data_ptr() + part.region.padding * size
            nothing = [0] * count
            return DecodeTable(nothing, nothing, homes, lengths, nothing)
        assert self._scratch is not None
        first = self._scratch.data_ptr()
        rows = list(range(first, first + count * form.row_bytes, form.row_bytes))
        exact, packs = [0] * count, [1] * count
        for index, part in moved.items():
            homes[index] = part.data.data_ptr() + part.region.padding * size
            lengths[index] = part.packed_tokens - part.region.padding
            rows[index], exact[index], packs[index] = part.rows.data_ptr(), part.tail, 0
        return DecodeTable(homes, lengths, rows, exact, packs)

    def commit(self, parts: Sequence[LayerPart]) -> None:
        """Pack the full blocks of sequences that were attended to in place, and keep their other rows."""
        if self.form is None:
            return
        self.pack([part for part in parts if part.newly_packed])
        for part in parts:
            packed, end = part.newly_packed, part.tail + part.fresh
            if end > packed and (packed or not part.past):  # rows that stay exact move to the front
                home = self.home_rows(part.region, part.layer)
                home[: end - packed] = part.rows[packed:end].clone() if part.past else part.rows[packed:end]

    def pack(self, parts: Sequence[LayerPart]) -> None:
        """Pack the oldest rows of some parts of one layer, each a full block or more, into its data.

        Raises:
            StorageError: if a value cannot be packed.
        """
        if not parts:
            return
        assert self.form is not None
        layer = parts[0].form
        rows = [part.rows[: part.newly_packed] for part in parts]
        targets = [part.new_blocks for part in parts]
        try:
            self.kernels.pack_tokens(rows, self.form, layer.key_width, layer.value_width, targets)
        except ValueError as error:
            raise StorageError(
                f"the KV cache of layer {parts[0].layer} cannot be packed: {error}: use kv_quant=16"
            ) from error

    def home_rows(self, region: Region, layer: int) -> Tensor:
        """A region's exact rows [rows_held, keys + values] at one layer."""
        form = self.layers[layer]
        size = form.rows_held(region.capacity) * form.row_bytes
        return region.rows(layer, 0, size).view(self._dtype).view(-1, form.width)

    def _in_place(self, region: Region, layer: int, start: int, count: int) -> LayerPart:
        """A sequence that is attended to in place; its fresh rows are in the scratch where none are kept."""
        form = self.layers[layer]
        data = region.data_of(layer, 0, form.data_bytes(region.capacity))
        scratch = self._scratch
        if scratch is None or self._stays(region) or (region.length and form.rows_held(region.capacity)):
            return LayerPart(region, layer, data, self.home_rows(region, layer), count)
        rows = scratch[start * form.row_bytes : (start + count) * form.row_bytes]
        return LayerPart(region, layer, data, rows.view(self._dtype).view(count, form.width), count)

    def _stays(self, region: Region) -> bool:
        """Whether a sequence is attended to on the host: one that is there and has a past."""
        return self.host is not None and region.tier is Tier.HOST and region.length > 0

    def _move(self, pieces: Sequence[tuple[int, Tensor]], write: bool) -> int:
        """Read pieces of a buffer from the file, or write them to it; returns the bytes that crossed links.

        Args:
            pieces: (offset in the file, uint8 in the buffer).
        """
        if not pieces:
            return 0
        if self._pool is not None:  # both the disk's link and the device's
            return 2 * transfer_through(self._pool, self._file, pieces, write)
        return self._file.write_many(pieces) if write else self._file.read_many(pieces)


def _keep(home: Tensor, source: Tensor) -> int:
    """Copy bytes to where they are kept; returns their number."""
    home.copy_(source, non_blocking=True)
    return len(source)
