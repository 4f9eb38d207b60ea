"""Keys and values of prefixes that requests share, kept once in a tier of their own.

Every layer's keys and values lie head by head, [G, n, D] and [G, n, E], as products with many queries want
them. Where the policy packs the KV cache, a prefix is kept in two versions while both are needed: exact
for prompts behind it, whose tokens would have seen it exactly, and rounded through the policy's format for
decoding. So answers are the same as if each request kept the prefix for itself.

Axes: n tokens of the prefix, G key-value heads, D and E their widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from engine.errors import StorageError
from engine.kernels.backend import kernels_for
from engine.kernels.calls import PrefixRows
from engine.memory.staging import StagingPool, aligned_bytes, transfer_through
from engine.memory.storage import DiskFile, Tiers
from engine.spec.hardware import Tier
from engine.spec.kv_format import KVFormat
from engine.spec.kv_layout import KVLayer, prefix_begins
from engine.spec.layout import ALIGNMENT, KV_STAGE, STAGE_BUFFERS, STAGING_BUFFERS
from engine.spec.memory_plan import MemoryPlan

Home = Tensor | DiskFile
"""Where a version of a prefix is kept, all layers one after the other: uint8 in memory, or a file."""


@dataclass(eq=False)
class PrefixRegion:
    """Where one prefix is kept."""

    tokens: int
    layers: tuple[KVLayer, ...]
    homes: dict[bool, Home]
    """By whether it is exact: the exact version, until no prompt is left to be computed behind the prefix,
    and one that was rounded through the policy's format, where there is a format."""

    staged: list[dict[bool, Tensor]] | None = None
    """Per buffer the layer in it of each version, uint8; None where versions are used in their homes."""

    groups: dict[int, int] = field(default_factory=dict)
    """Key-value heads of every layer that was computed."""

    @cached_property
    def begins(self) -> list[int]:
        """Offset of every layer, and the end."""
        return prefix_begins(self.layers, self.tokens)

    def parts(self, layer: int, buffer_index: int, exact: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [G * n * D] and values [G * n * E] of a layer, near the device."""
        if self.staged is not None:
            data = self.staged[buffer_index][exact]
        else:
            home = self.homes[exact]
            assert isinstance(home, Tensor)
            data = home[self.begins[layer] : self.begins[layer + 1]]
        form = self.layers[layer]
        values = data[: self.tokens * form.row_bytes].view(dtype)
        keys = self.tokens * form.key_width
        return values[:keys], values[keys:]


@dataclass(frozen=True)
class PrefixUse:
    """A prefix that rows of a device batch attend to."""

    region: PrefixRegion
    rows: PrefixRows
    exact: bool
    """Whether they see the prefix as it was computed, as prompts do."""

    @property
    def version(self) -> bool:
        """Which version they see: True for the exact one, also where nothing is packed."""
        return self.exact or self.region.layers[0].form is None


@dataclass(frozen=True)
class PrefixBatch:
    """What a device batch has to do with prefixes."""

    computed: Mapping[int, PrefixRegion]
    """Those that it computes, by their index in the batch."""

    uses: Sequence[PrefixUse]


class PrefixCache:
    """The prefixes of a run.

    Where they are not near the device, one layer of all that a pass uses is brought into one of two buffers
    before the layer is computed, for all device batches, and what a pass computes is kept after it.
    """

    def __init__(
        self,
        layers: tuple[KVLayer, ...],
        form: KVFormat | None,
        dtype: torch.dtype,
        tiers: Tiers,
        plan: MemoryPlan,
        tier: Tier,
    ) -> None:
        """Allocate the buffers, as planned.

        Args:
            form: through which prefixes are rounded; None to keep them exact.
            tier: where they are kept.

        Raises:
            BudgetError: if the device's budget does not allow it.
        """
        self._layers, self._form, self._dtype = layers, form, dtype
        self._tiers, self._tier, self._chunk = tiers, tier, plan.batch_tokens
        self._kernels = kernels_for(tiers.device)
        self._buffers: list[Tensor] = []
        self._pool: StagingPool | None = None
        if plan.prefix_stage:
            size = plan.prefix_stage + ALIGNMENT
            self._buffers = [
                aligned_bytes(tiers, Tier.DEVICE, size, "KV buffers") for _ in range(STAGE_BUFFERS)
            ]
            if tier is Tier.DISK and not tiers.unified:
                self._pool = StagingPool(tiers, STAGING_BUFFERS, ALIGNMENT + min(KV_STAGE, plan.prefix_stage))

    def allocate(self, tokens: int, decodes: bool = True) -> PrefixRegion:
        """Allocate for a prefix that is to be computed.

        Args:
            decodes: whether decoding will attend to it, besides prompts.

        Raises:
            BudgetError: if the tier's budget does not allow it.
        """
        homes = {True: self._home(tokens)}
        if not self._buffers:
            return PrefixRegion(tokens, self._layers, homes)
        if self._form is not None and decodes:
            homes[False] = self._home(tokens)
        return PrefixRegion(tokens, self._layers, homes, [{} for _ in range(STAGE_BUFFERS)])

    def keep(self, region: PrefixRegion, exact: bool) -> None:
        """Keep a prefix that is computed in all layers, in the versions that are still needed.

        Args:
            exact: whether a prompt is still to be computed behind it.

        Raises:
            StorageError: if a value cannot be packed.
        """
        if self._form is None or True not in region.homes:
            return
        if False not in region.homes:
            region.homes[False] = self._home(region.tokens) if exact else region.homes[True]
            for layer in range(len(self._layers)):
                self._round(region, layer, buffer_index=0)
            if not exact:
                del region.homes[True]
        elif not exact:
            self._tiers.free(region.homes.pop(True))

    def free(self, region: PrefixRegion) -> None:
        """Give back what a prefix held."""
        for home in region.homes.values():
            self._tiers.free(home)
        region.homes.clear()

    def load(self, layer: int, buffer_index: int, batches: Iterable[PrefixBatch]) -> int:
        """Copy a layer of all prefixes in use into one of the two buffers; returns bytes moved."""
        if not self._buffers:
            return 0
        wanted: dict[PrefixRegion, set[bool]] = {}
        computed = {region for batch in batches for region in batch.computed.values()}
        for region in computed:
            wanted[region] = set(region.homes)
        for batch in batches:
            for use in batch.uses:
                wanted.setdefault(use.region, set()).add(use.version)
        at = moved = 0
        for region, versions in wanted.items():
            assert region.staged is not None
            size = region.begins[layer + 1] - region.begins[layer]
            for exact in sorted(versions):
                staged = region.staged[buffer_index][exact] = self._buffers[buffer_index][at : at + size]
                at += size
                if region not in computed:
                    moved += self._move(region.homes[exact], region.begins[layer], staged, write=False)
        return moved

    def store(self, layer: int, buffer_index: int, batch: PrefixBatch) -> int:
        """Keep one layer of the prefixes that a device batch computed; returns bytes moved."""
        moved = 0
        for region in batch.computed.values() if self._buffers else ():
            assert region.staged is not None
            if False in region.homes:
                self._round(region, layer, buffer_index)
            for exact, home in region.homes.items():
                staged = region.staged[buffer_index][exact]
                moved += self._move(home, region.begins[layer], staged, write=True)
        return moved

    def view(self, layer: int, buffer_index: int, batch: PrefixBatch) -> LayerPrefixes:
        """What attention needs of the prefixes while it computes a device batch at a layer."""
        return LayerPrefixes(batch, layer, buffer_index, self._dtype)

    def _home(self, tokens: int) -> Home:
        size = prefix_begins(self._layers, tokens)[-1]
        if self._tier is Tier.DISK:
            return self._tiers.file(size, "shared KV cache")
        return self._tiers.tensor(self._tier, (size,), torch.uint8, "shared KV cache")

    def _move(self, home: Home, begin: int, part: Tensor, write: bool) -> int:
        """Copy ``part``, uint8 in a buffer, from its home or to it; returns the bytes that crossed links."""
        if isinstance(home, Tensor):
            kept = home[begin : begin + len(part)]
            target, source = (kept, part) if write else (part, kept)
            target.copy_(source, non_blocking=True)
            return len(part)
        if self._pool is not None:
            return transfer_through(self._pool, home, [(begin, part)], write)
        return home.write(begin, part) if write else home.read(begin, part)

    def _round(self, region: PrefixRegion, layer: int, buffer_index: int) -> None:
        """Pack and unpack a layer, a few tokens at a time; all heads at once, as groups may span heads."""
        assert self._form is not None
        if layer not in region.groups:  # one that does not attend
            return
        groups, formats = region.groups[layer], (self._form.keys, self._form.values)
        sources, targets = (region.parts(layer, buffer_index, exact, self._dtype) for exact in (True, False))
        for source, target, spec in zip(sources, targets, formats, strict=True):
            for begin in range(0, region.tokens, self._chunk):
                part = slice(begin, min(begin + self._chunk, region.tokens))
                heads = source.view(groups, region.tokens, -1)[:, part]
                rows = heads.transpose(0, 1).flatten(1).contiguous()
                size = spec.blocks(len(rows)), spec.block_bytes(rows.shape[1])
                packed = torch.empty(size, dtype=torch.uint8, device=rows.device)
                try:
                    self._kernels.pack(rows, spec, packed)
                except ValueError as error:
                    raise StorageError(
                        f"the KV cache of layer {layer} cannot be packed: {error}: use kv_quant=16"
                    ) from error
                self._kernels.unpack(packed, spec, rows)
                rounded = rows.unflatten(1, (groups, -1)).transpose(0, 1)
                target.view(groups, region.tokens, -1)[:, part] = rounded


@dataclass(frozen=True)
class LayerPrefixes:
    """The prefixes of one device batch at one layer."""

    batch: PrefixBatch
    layer: int
    buffer_index: int
    dtype: torch.dtype

    def write(self, index: int, key: Tensor, value: Tensor) -> bool:
        """Keep keys [T, G, D] and values [T, G, E] if ``index`` is a prefix; False if it is a request."""
        region = self.batch.computed.get(index)
        if region is None:
            return False
        region.groups[self.layer] = key.shape[1]
        targets = region.parts(self.layer, self.buffer_index, True, self.dtype)
        for target, fresh in zip(targets, (key, value), strict=True):
            target.view(fresh.shape[1], len(fresh), -1).copy_(fresh.transpose(0, 1))
        return True

    def parts(self) -> Iterator[tuple[Tensor, Tensor, PrefixRows]]:
        """Keys [G, n, D] and values [G, n, E] of every prefix that is attended to, and by which rows."""
        for use in self.batch.uses:
            groups, tokens = use.region.groups[self.layer], use.region.tokens
            keys, values = use.region.parts(self.layer, self.buffer_index, use.version, self.dtype)
            yield keys.view(groups, tokens, -1), values.view(groups, tokens, -1), use.rows
