"""The KV cache: one region per sequence in the tier of its seat, in the policy's precision.

A region holds for every layer one row per token: the token's keys followed by its values, each
packed where the policy says so. Uncompressed rows in the device tier are attended to in place. All
others are gathered into one of two buffers before a layer is computed, moved and unpacked at once
for the whole device batch, and their new rows are written home after it. Attention always sees the
fresh rows exactly; compression concerns later passes (as in FlexGen).

Axes: T fresh tokens, n all tokens of a sequence, G key-value heads, D and E their widths, R rows of
a device batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import StorageError
from engine.memory.quantize import pack_rows, unpack_rows
from engine.memory.storage import DiskFile, Tiers
from engine.spec.hardware import Tier
from engine.spec.layout import SLOTS, MemoryPlan, row_bytes
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy


@dataclass
class Region:
    """Where one sequence's KV cache lives."""

    tier: Tier
    capacity: int
    nbytes: int
    data: Tensor | None = None
    file: DiskFile | None = None
    length: int = 0
    """Tokens that are in it."""


@dataclass
class _Moved:
    """One sequence's rows in a buffer: its past ones, then its fresh ones."""

    region: Region
    start: int
    fresh: int

    @property
    def past_rows(self) -> slice:
        return slice(self.start, self.start + self.region.length)

    @property
    def fresh_rows(self) -> slice:
        return slice(self.start + self.region.length, self.start + self.region.length + self.fresh)


@dataclass
class _Loaded:
    """What a buffer holds: a device batch's rows of one layer."""

    layer: int
    rows: Tensor
    moved: dict[int, _Moved]
    """By the sequence's place in the batch, without those attended to in place or not cached."""


class KVCache:
    """All sequences' keys and values."""

    def __init__(self, spec: ModelSpec, policy: Policy, plan: MemoryPlan, tiers: Tiers) -> None:
        self._widths, self._quant, self._tiers = spec.kv_widths, policy.kv_quant, tiers
        self._dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self._key_bytes = [row_bytes(key, policy, spec.compute_bytes) for key, _ in spec.kv_widths]
        self._row_bytes = [
            key + row_bytes(value, policy, spec.compute_bytes)
            for key, (_, value) in zip(self._key_bytes, spec.kv_widths, strict=True)
        ]
        self._seats = plan.kv_seats
        self.moves = plan.kv_moves
        self.placed = dict.fromkeys(Tier, 0)
        self._slots: list[_Loaded | None] = [None] * SLOTS
        self._buffers: list[Tensor] = []
        self._staging: dict[str, Tensor] = {}
        self._device_staging: dict[str, Tensor] = {}
        if not self.moves:
            return
        widest = max(key + value for key, value in spec.kv_widths)
        self._buffers = [
            tiers.tensor(Tier.DEVICE, (plan.kv_rows * widest,), self._dtype, "KV buffers")
            for _ in range(SLOTS)
        ]
        for lane, rows in (("in", plan.kv_rows), ("out", plan.batch_tokens)):
            size = (rows * max(self._row_bytes),)
            self._staging[lane] = tiers.tensor(Tier.HOST, size, torch.uint8, "staging")
            if not tiers.unified:
                self._device_staging[lane] = tiers.tensor(Tier.DEVICE, size, torch.uint8, "staging")

    def allocate(self, seat: int, capacity: int) -> Region | None:
        """Make room for the sequence that takes a seat; None if nothing needs to be kept.

        Raises:
            BudgetError: if the tier's budget does not allow it.
            StorageError: if the disk is full.
        """
        if not capacity:
            return None
        tier = self._seats[seat]
        region = Region(tier, capacity, capacity * sum(self._row_bytes))
        if tier is Tier.DISK:
            region.file = self._tiers.file(region.nbytes, "KV cache")
        else:
            region.data = self._tiers.tensor(tier, (region.nbytes,), torch.uint8, "KV cache")
        self.placed[tier] += region.nbytes
        return region

    def free(self, region: Region) -> None:
        """Give a sequence's room back."""
        if region.file is not None:
            self._tiers.free_file(region.file)
        elif region.data is not None:
            self._tiers.free(region.data)
        region.file = region.data = None

    def load(self, layer: int, slot: int, regions: Sequence[Region | None], fresh: Sequence[int]) -> int:
        """Bring a batch's past keys and values of one layer into buffer ``slot``; returns bytes moved.

        Args:
            regions: one per sequence of the device batch; None for sequences without a KV cache.
            fresh: tokens that each sequence will add in this pass.
        """
        moved: dict[int, _Moved] = {}
        start = 0
        candidates = [
            (i, region)
            for i, region in enumerate(regions)
            if region is not None and not self._in_place(region)
        ]
        for i, region in sorted(candidates, key=lambda item: not item[1].length):  # those with a past first
            moved[i] = _Moved(region, start, fresh[i])
            start += region.length + fresh[i]
        width = sum(self._widths[layer])
        rows = self._buffers[slot][: start * width].view(start, width)  # [R, keys + values]
        self._slots[slot] = _Loaded(layer, rows, moved)
        with_past = [part for part in moved.values() if part.region.length]
        return self._fetch(layer, rows, with_past) if with_past else 0

    def store(self, slot: int) -> int:
        """Write the rows that the computation added in buffer ``slot`` home; returns bytes moved."""
        loaded = self._slots[slot]
        assert loaded is not None
        parts = list(loaded.moved.values())
        if not parts:
            return 0
        row = self._row_bytes[loaded.layer]
        fresh = torch.cat([loaded.rows[part.fresh_rows] for part in parts])  # [fresh tokens, keys + values]
        size = len(fresh) * row
        encoded = (self._device_staging or self._staging)["out"][:size].view(-1, row)
        self._encode(fresh, loaded.layer, encoded)
        at_home, moved = encoded, 0
        if self._device_staging and any(part.region.tier is not Tier.DEVICE for part in parts):
            at_home = self._staging["out"][:size].view(-1, row).copy_(encoded)
            moved += size
        done = 0
        for part in parts:
            region, count = part.region, part.fresh
            begin = self._begin(region, loaded.layer) + region.length * row
            rows = (encoded if region.tier is Tier.DEVICE else at_home)[done : done + count].view(-1)
            done += count
            if region.file is not None:
                region.file.write(begin, rows)
                moved += count * row
            else:
                assert region.data is not None
                region.data[begin : begin + count * row].copy_(rows)
        return moved

    def view(self, layer: int, slot: int, regions: Sequence[Region | None]) -> BatchKeyValues:
        """What attention needs while it computes this batch at this layer."""
        return BatchKeyValues(self, layer, regions, self._slots[slot] if self.moves else None)

    def rows_of(self, index: int, layer: int, region: Region, loaded: _Loaded | None) -> Tensor:
        """A sequence's rows [n, keys + values], its past ones filled in and its fresh ones to be written."""
        if loaded is not None and index in loaded.moved:
            part = loaded.moved[index]
            return loaded.rows[part.start : part.fresh_rows.stop]
        assert region.data is not None
        begin = self._begin(region, layer)
        size = region.capacity * self._row_bytes[layer]
        return region.data[begin : begin + size].view(self._dtype).view(region.capacity, -1)

    def key_width(self, layer: int) -> int:
        """Values of a row that are keys; the rest are values."""
        return self._widths[layer][0]

    def _in_place(self, region: Region) -> bool:
        return region.tier is Tier.DEVICE and self._quant is None

    def _begin(self, region: Region, layer: int) -> int:
        return region.capacity * sum(self._row_bytes[:layer])

    def _fetch(self, layer: int, rows: Tensor, parts: Sequence[_Moved]) -> int:
        """Gather encoded past rows in the order of the buffer, move them at once, decode them at once."""
        row, count = self._row_bytes[layer], parts[-1].past_rows.stop
        moved = 0
        size = count * row
        raw_in_place = self._quant is None and not self._device_staging
        gathered = rows.view(-1).view(torch.uint8) if raw_in_place else self._staging["in"]
        gathered = gathered[:size].view(count, row)
        if self._device_staging and gathered.is_pinned():
            torch.cuda.current_stream().synchronize()  # the copy that used the staging buffer last
        for part in parts:
            region = part.region
            begin, length = self._begin(region, layer), region.length * row
            target = gathered[part.past_rows].view(-1)
            if region.file is not None:
                region.file.read(begin, target)
                moved += length
            elif region.tier is Tier.HOST or not self._device_staging:
                assert region.data is not None
                target.copy_(region.data[begin : begin + length])
        if self._device_staging:
            gathered = self._device_staging["in"][:size].view(count, row).copy_(gathered, non_blocking=True)
            moved += size
            for part in parts:
                if part.region.tier is Tier.DEVICE:
                    assert part.region.data is not None
                    begin = self._begin(part.region, layer)
                    source = part.region.data[begin : begin + part.region.length * row]
                    gathered[part.past_rows].view(-1).copy_(source)
        if not raw_in_place:
            self._decode(gathered, layer, rows[:count])
        return moved

    def _encode(self, rows: Tensor, layer: int, out: Tensor) -> None:
        if self._quant is None:
            out.copy_(rows.view(torch.uint8))
            return
        keys = self.key_width(layer)
        try:
            pack_rows(rows[:, :keys], self._quant, out[:, : self._key_bytes[layer]])
            pack_rows(rows[:, keys:], self._quant, out[:, self._key_bytes[layer] :])
        except ValueError as error:
            raise StorageError(
                f"the KV cache of layer {layer} cannot be packed: {error}: use kv_bits=16"
            ) from error

    def _decode(self, encoded: Tensor, layer: int, out: Tensor) -> None:
        if self._quant is None:
            out.view(torch.uint8).copy_(encoded)
            return
        keys = self.key_width(layer)
        unpack_rows(encoded[:, : self._key_bytes[layer]], self._quant, out[:, :keys])
        unpack_rows(encoded[:, self._key_bytes[layer] :], self._quant, out[:, keys:])


class BatchKeyValues:
    """The `KeyValues` of one device batch at one layer, over a `KVCache`."""

    def __init__(
        self, cache: KVCache, layer: int, regions: Sequence[Region | None], loaded: _Loaded | None
    ) -> None:
        self._cache, self._layer, self._regions, self._loaded = cache, layer, regions, loaded

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append fresh keys [T, G, D] and values [T, G, E] of a sequence; return all of its n tokens'."""
        region = self._regions[index]
        if region is None:
            return key, value
        total = region.length + key.shape[0]
        rows = self._cache.rows_of(index, self._layer, region, self._loaded)[:total]
        split = self._cache.key_width(self._layer)
        keys = rows[:, :split].view(total, *key.shape[1:])
        values = rows[:, split:].view(total, *value.shape[1:])
        keys[region.length :] = key
        values[region.length :] = value
        return keys, values
