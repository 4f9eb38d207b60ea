"""The KV cache: one region per sequence in the tier of its seat, in the policy's precision.

Regions near the device are attended to in place. Others are brought, as they are kept, into one of two
buffers before a layer is computed, and what the pass adds is written home after it. Attention always
sees the fresh tokens exactly; compression concerns later passes (as in FlexGen).

Axes: T fresh tokens, n all tokens of a sequence, G key-value heads, D and E their widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import StorageError
from engine.kernels import ops
from engine.kernels.calls import CachedSequence
from engine.memory.kv_regions import LayerPart, Region
from engine.memory.storage import Tiers
from engine.spec.hardware import Tier
from engine.spec.kv_format import KVFormat
from engine.spec.layout import IN_MEMORY, SLOTS, MemoryPlan, aligned, is_near, kv_layers
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy

_NOTHING = torch.empty(0, dtype=torch.uint8)


class KVCache:
    """All sequences' keys and values."""

    def __init__(self, spec: ModelSpec, policy: Policy, plan: MemoryPlan, tiers: Tiers) -> None:
        self.layers = kv_layers(spec, policy)
        self.form: KVFormat | None = policy.kv_quant
        self.moves = plan.kv_moves
        self.placed = dict.fromkeys(Tier, 0)
        self._tiers, self._seats = tiers, plan.kv_seats
        self._dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self.attends_exact = ops.attends_exact(tiers.device, self._dtype)
        self._moved: list[dict[int, LayerPart]] = [{} for _ in range(SLOTS)]
        self._buffers: list[Tensor] = []
        self._scratch: Tensor | None = None
        if self.form:
            size = plan.batch_tokens * max(layer.row_bytes for layer in self.layers)
            self._scratch = tiers.tensor(Tier.DEVICE, (size,), torch.uint8, "KV buffers")
        if not self.moves:
            return
        size = plan.kv_buffer
        self._buffers = [tiers.tensor(Tier.DEVICE, (size,), torch.uint8, "KV buffers") for _ in range(SLOTS)]
        if self.form:
            self._blocks = tiers.tensor(Tier.DEVICE, (size,), torch.uint8, "staging")
        if not tiers.unified:
            self._incoming, self._outgoing = (
                tiers.tensor(Tier.HOST, (size,), torch.uint8, "staging") for _ in range(2)
            )

    def allocate(self, seat: int, capacity: int) -> Region | None:
        """Make room for the sequence that takes a seat; None if nothing needs to be kept.

        Raises:
            BudgetError: if the tier's budget does not allow it.
            StorageError: if the disk is full.
        """
        if not capacity:
            return None
        region = Region(self._seats[seat], capacity, self.layers)
        if region.tier is Tier.DISK:
            region.file = self._tiers.file(region.nbytes, "KV cache")
        else:
            region.data = self._tiers.tensor(region.tier, (region.nbytes,), torch.uint8, "KV cache")
        self.placed[region.tier] += region.nbytes
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
        form = self.layers[layer]
        parts: dict[int, LayerPart] = {}
        at = used = moved = 0
        buffer = self._buffers[slot]
        incoming = buffer if self._tiers.unified else self._incoming
        if incoming.is_pinned():
            torch.cuda.current_stream().synchronize()  # the copy that used the staging buffer last
        far = [
            (index, region)
            for index, region in enumerate(regions)
            if region is not None and not is_near(region.tier, self._tiers.unified)
        ]
        for index, region in sorted(far, key=lambda item: not item[1].length):  # those with a past first
            packed = form.packed_bytes(region.length)
            exact = (region.length - form.packed_tokens(region.length)) * form.row_bytes
            rows_at = at + aligned(packed, IN_MEMORY)
            end = rows_at + exact + fresh[index] * form.row_bytes
            rows = buffer[rows_at:end].view(self._dtype).view(-1, form.width)
            parts[index] = LayerPart(region, layer, buffer[at:rows_at], rows, fresh[index])
            begin = region.begins[layer]
            if packed:
                moved += region.read(begin, incoming[at : at + packed])
            if exact:
                home = begin + form.rows_begin(region.capacity)
                moved += region.read(home, incoming[rows_at : rows_at + exact])
            used = rows_at + exact if region.length else used
            at = aligned(end, IN_MEMORY)
        self._moved[slot] = parts
        if not self._tiers.unified and used:
            buffer[:used].copy_(self._incoming[:used], non_blocking=True)
            moved += used
        return moved

    def store(self, slot: int) -> int:
        """Write what the computation added in buffer ``slot`` home; returns bytes moved."""
        pieces: list[tuple[Region, int, Tensor]] = []
        full: list[LayerPart] = []
        targets: list[Tensor] = []
        at = 0
        for part in self._moved[slot].values():
            form, begin, packed = part.form, part.region.begins[part.layer], part.newly_packed
            if packed:
                offset = form.packed_bytes(part.past)
                size = form.packed_bytes(part.past + part.fresh) - offset
                full.append(part)
                targets.append(self._blocks[at : at + size])
                pieces.append((part.region, begin + offset, targets[-1]))
                at += size
            first = packed or part.tail
            rows = part.rows[first : part.tail + part.fresh].reshape(-1).view(torch.uint8)
            home = begin + form.rows_begin(part.region.capacity) + (first - packed) * form.row_bytes
            pieces.append((part.region, home, rows))
        self.pack(full, targets)
        return self._write(pieces)

    def view(
        self, layer: int, slot: int, regions: Sequence[Region | None], fresh: Sequence[int]
    ) -> BatchKeyValues:
        """What attention needs while it computes this batch at this layer."""
        moved = self._moved[slot] if self.moves else {}
        parts: dict[int, LayerPart] = {}
        start = 0
        for index, (region, count) in enumerate(zip(regions, fresh, strict=True)):
            if index in moved:
                parts[index] = moved[index]
            elif region is not None:
                parts[index] = self._at_home(region, layer, start, count)
            start += count
        return BatchKeyValues(self, parts, [part for i, part in parts.items() if i not in moved])

    def pack(self, parts: Sequence[LayerPart], targets: Sequence[Tensor]) -> None:
        """Pack the oldest rows of some parts of one layer into whole blocks.

        Raises:
            StorageError: if a value cannot be packed.
        """
        if not parts:
            return
        assert self.form is not None
        layer = parts[0].form
        rows = [part.rows[: part.newly_packed] for part in parts]
        try:
            ops.pack_tokens(rows, self.form, layer.key_width, layer.value_width, targets)
        except ValueError as error:
            raise StorageError(
                f"the KV cache of layer {parts[0].layer} cannot be packed: {error}: use kv_quant=16"
            ) from error

    def home_rows(self, region: Region, layer: int) -> Tensor:
        """A region's exact rows [room, keys + values] at one layer."""
        assert region.data is not None
        form = self.layers[layer]
        begin = region.begins[layer] + form.rows_begin(region.capacity)
        size = form.rows_held(region.capacity) * form.row_bytes
        return region.data[begin : begin + size].view(self._dtype).view(-1, form.width)

    def _at_home(self, region: Region, layer: int, start: int, count: int) -> LayerPart:
        """A sequence that is attended to in place; tokens without a row of their own lie in the scratch."""
        assert region.data is not None
        form, begin = self.layers[layer], region.begins[layer]
        data = region.data[begin : begin + form.rows_begin(region.capacity)]
        if self._scratch is None or (region.length and form.rows_held(region.capacity)):
            return LayerPart(region, layer, data, self.home_rows(region, layer), count)
        rows = self._scratch[start * form.row_bytes : (start + count) * form.row_bytes]
        return LayerPart(region, layer, data, rows.view(self._dtype).view(count, form.width), count)

    def _write(self, pieces: Sequence[tuple[Region, int, Tensor]]) -> int:
        if not pieces:
            return 0
        moved = 0
        if not self._tiers.unified:
            gathered = torch.cat([piece for _, _, piece in pieces])
            at_home = self._outgoing[: len(gathered)].copy_(gathered)
            moved += len(gathered)
            parts = at_home.split([len(piece) for _, _, piece in pieces])
            pieces = [(region, at, part) for (region, at, _), part in zip(pieces, parts, strict=True)]
        return moved + sum(region.write(at, piece) for region, at, piece in pieces)


class BatchKeyValues:
    """The `KeyValues` of one device batch at one layer, over a `KVCache`."""

    def __init__(self, cache: KVCache, parts: dict[int, LayerPart], at_home: list[LayerPart]) -> None:
        self._cache, self._parts, self._at_home = cache, parts, at_home
        self.form = cache.form

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | CachedSequence:
        """Append fresh keys [T, G, D] and values [T, G, E] of a sequence; return all of its n tokens'."""
        part = self._parts.get(index)
        if part is None:
            return key, value
        width, end = part.form.key_width, part.tail + len(key)
        part.rows[part.tail : end, :width] = key.reshape(len(key), -1)
        part.rows[part.tail : end, width:] = value.reshape(len(value), -1)
        if self.form is None:
            rows = part.rows[:end]
            if part.past and len(key) == 1 and self._cache.attends_exact:
                return CachedSequence(_NOTHING, 0, rows)
            return rows[:, :width].view(end, *key.shape[1:]), rows[:, width:].view(end, *value.shape[1:])
        if not part.past:
            return key, value
        assert len(key) == 1, "a packed past is read one token at a time"
        packed = part.data[: part.form.packed_bytes(part.past)]
        return CachedSequence(packed, part.packed_tokens, part.rows[:end])

    def commit(self) -> None:
        """Pack what is full of the sequences that are attended to in place."""
        if self.form is None:
            return
        full = [part for part in self._at_home if part.newly_packed]
        self._cache.pack(full, [self._new_blocks(part) for part in full])
        for part in self._at_home:
            packed, end = part.newly_packed, part.tail + part.fresh
            if end > packed and (packed or not part.past):  # rows that stay exact move to the front
                home = self._cache.home_rows(part.region, part.layer)
                home[: end - packed] = part.rows[packed:end].clone() if part.past else part.rows[packed:end]

    def _new_blocks(self, part: LayerPart) -> Tensor:
        """Where the blocks lie that this pass fills."""
        return part.data[part.form.packed_bytes(part.past) : part.form.packed_bytes(part.past + part.fresh)]
