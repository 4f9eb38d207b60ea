"""The KV cache: one region per sequence in the tier of its seat, in the policy's precision.

A region holds for every layer the keys and then the values of up to ``capacity`` tokens, one row of
bytes per token. Uncompressed rows in the device tier are attended to in place. All others are
brought into one of two buffers before a layer is computed, and their new rows are written back
after it; attention always sees the fresh rows exactly, compression concerns later passes (as in
FlexGen).

Axes: T fresh tokens, n all tokens of a sequence, G key-value heads, D and E their widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
class _Loaded:
    """A device batch's keys and values of one layer, as attention sees them."""

    layer: int
    regions: Sequence[Region | None]
    fresh: Sequence[int]
    rows: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    """Per sequence its keys [n, key width] and values [n, value width], past first; None if not kept."""


class KVCache:
    """All sequences' keys and values."""

    def __init__(self, spec: ModelSpec, policy: Policy, plan: MemoryPlan, tiers: Tiers) -> None:
        self._widths, self._quant, self._tiers = spec.kv_widths, policy.kv_quant, tiers
        self._dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self._row_bytes = [
            (row_bytes(key, policy, spec.compute_bytes), row_bytes(value, policy, spec.compute_bytes))
            for key, value in spec.kv_widths
        ]
        self._per_token = sum(key + value for key, value in self._row_bytes)
        widest = max(key + value for key, value in spec.kv_widths)
        self.moves = bool(plan.longest) and (
            bool(self._quant) or any(t is not Tier.DEVICE for t in plan.kv_seats)
        )
        self._buffers: list[Tensor] = []
        self._staging: dict[str, Tensor] = {}
        self._device_staging: dict[str, Tensor] = {}
        if self.moves:
            self._buffers = [
                tiers.tensor(Tier.DEVICE, (plan.kv_rows * widest,), self._dtype, "KV buffers")
                for _ in range(SLOTS)
            ]
            largest = plan.longest * max(key + value for key, value in self._row_bytes)
            for lane in ("in", "out"):
                self._staging[lane] = tiers.tensor(Tier.HOST, (largest,), torch.uint8, "staging")
                if not tiers.unified:
                    self._device_staging[lane] = tiers.tensor(Tier.DEVICE, (largest,), torch.uint8, "staging")
        self._slots: list[_Loaded | None] = [None] * SLOTS
        self.placed = dict.fromkeys(Tier, 0)

    def allocate(self, tier: Tier, capacity: int) -> Region | None:
        """Make room for one sequence; None if nothing needs to be kept.

        Raises:
            BudgetError: if the tier's budget does not allow it.
        """
        if not capacity:
            return None
        region = Region(tier, capacity, capacity * self._per_token)
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

    def close(self) -> None:
        """Give the buffers back; regions are given back one by one with `free`."""
        for tensor in (*self._buffers, *self._staging.values(), *self._device_staging.values()):
            self._tiers.free(tensor)
        self._slots = [None] * SLOTS
        self._buffers, self._staging, self._device_staging = [], {}, {}

    def load(self, layer: int, slot: int, regions: Sequence[Region | None], fresh: Sequence[int]) -> int:
        """Bring a batch's past keys and values of one layer into buffer ``slot``; returns bytes moved.

        Args:
            regions: one per sequence of the device batch; None for sequences without a KV cache.
            fresh: tokens that each sequence will add in this pass.
        """
        loaded = _Loaded(layer, regions, fresh)
        moved, used = 0, 0
        for region, count in zip(regions, fresh, strict=True):
            if region is None or self._in_place(region):
                loaded.rows.append(None)
                continue
            views = []
            for width in self._widths[layer]:
                size = (region.length + count) * width
                views.append(self._buffers[slot][used : used + size].view(-1, width))
                used += size
            if region.length:
                moved += self._fetch(region, layer, views)
            loaded.rows.append((views[0], views[1]))
        self._slots[slot] = loaded
        return moved

    def store(self, slot: int) -> int:
        """Write the rows that the computation added in buffer ``slot`` home; returns bytes moved."""
        loaded = self._slots[slot]
        assert loaded is not None
        moved = 0
        for region, rows, count in zip(loaded.regions, loaded.rows, loaded.fresh, strict=True):
            if region is not None and rows is not None:
                moved += self._write_back(
                    region, loaded.layer, [view[region.length :] for view in rows], count
                )
        return moved

    def view(self, layer: int, slot: int, regions: Sequence[Region | None]) -> BatchKeyValues:
        """What attention needs while it computes this batch at this layer."""
        return BatchKeyValues(self, layer, regions, self._slots[slot] if self.moves else None)

    def in_place_rows(self, region: Region, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [capacity, width] of a region that attention may use directly."""
        assert region.data is not None
        keys, values = (
            region.data[begin:end].view(self._dtype).view(region.capacity, -1)
            for begin, end, _ in self._extents(region, layer)
        )
        return keys, values

    def _in_place(self, region: Region) -> bool:
        return region.tier is Tier.DEVICE and self._quant is None

    def _extents(self, region: Region, layer: int) -> list[tuple[int, int, int]]:
        """Begin, end and row bytes of a layer's keys and values within a region."""
        begin = region.capacity * sum(key + value for key, value in self._row_bytes[:layer])
        extents = []
        for row in self._row_bytes[layer]:
            extents.append((begin, begin + region.capacity * row, row))
            begin += region.capacity * row
        return extents

    def _fetch(self, region: Region, layer: int, views: list[Tensor]) -> int:
        moved, used = 0, 0
        for view, (begin, _, row) in zip(views, self._extents(region, layer), strict=True):
            count = region.length * row
            if region.file is not None:
                source = self._staging["in"][used : used + count]
                if source.is_pinned():
                    torch.cuda.current_stream().synchronize()  # the copy that used the staging buffer last
                region.file.read(begin, source)
                moved += count
            else:
                assert region.data is not None
                source = region.data[begin : begin + count]
            if self._device_staging and region.tier is not Tier.DEVICE:
                source = self._device_staging["in"][used : used + count].copy_(source, non_blocking=True)
                moved += count
            self._decode(source.view(region.length, row), view[: region.length])
            used += count
        return moved

    def _write_back(self, region: Region, layer: int, fresh: list[Tensor], count: int) -> int:
        moved, used = 0, 0
        for rows, (begin, _, row) in zip(fresh, self._extents(region, layer), strict=True):
            begin += region.length * row
            size = count * row
            staging = self._device_staging or self._staging
            encoded = self._encode(rows, staging["out"][used : used + size].view(count, row)).view(-1)
            if region.file is not None:
                if self._device_staging:
                    encoded = self._staging["out"][used : used + size].copy_(encoded)
                    moved += size
                region.file.write(begin, encoded)
                moved += size
            else:
                assert region.data is not None
                region.data[begin : begin + size].copy_(encoded, non_blocking=True)
                moved += size if region.tier is not Tier.DEVICE and self._device_staging else 0
            used += size
        return moved

    def _encode(self, rows: Tensor, out: Tensor) -> Tensor:
        if self._quant is None:
            return out.copy_(rows.contiguous().view(torch.uint8).view(out.shape))
        return pack_rows(rows, self._quant, out)

    def _decode(self, encoded: Tensor, out: Tensor) -> None:
        if self._quant is None:
            out.copy_(encoded.contiguous().view(-1).view(self._dtype).view(out.shape))
        else:
            unpack_rows(encoded, self._quant, out)


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
        rows = self._loaded.rows[index] if self._loaded is not None else None
        if rows is None:
            rows = self._cache.in_place_rows(region, self._layer)
        total = region.length + key.shape[0]
        found = []
        for kept, fresh in zip(rows, (key, value), strict=True):
            all_rows = kept[:total].view(total, *fresh.shape[1:])
            all_rows[region.length :] = fresh
            found.append(all_rows)
        return found[0], found[1]
