"""Keys and values of prefixes that requests share, kept once near the device.

Every layer's keys and values lie head by head, [G, n, D] and [G, n, E], as products with many queries want
them. Where the policy packs the KV cache, a prefix is kept in two versions while both are asked for: exact
for prompts behind it, whose tokens would have seen it exactly, and rounded through the policy's format for
decoding. So answers are those of requests that each keep the prefix for themselves.

Axes: n tokens of the prefix, G key-value heads, D and E their widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from engine.errors import StorageError
from engine.kernels import ops
from engine.memory.storage import Tiers
from engine.spec.hardware import Tier
from engine.spec.kv_format import KVFormat
from engine.spec.layout import KVLayer, prefix_begins


@dataclass(eq=False)
class PrefixRoom:
    """Where one prefix is kept."""

    tokens: int
    layers: tuple[KVLayer, ...]
    exact: Tensor | None
    """uint8, all layers one after the other; None once no prompt is to be fed behind it."""

    rounded: Tensor | None = None
    """The same through the policy's format; None where nothing is packed."""

    groups: list[int] = field(init=False)
    """Key-value heads of every layer, known once it is computed."""

    def __post_init__(self) -> None:
        self.groups = [0] * len(self.layers)

    @cached_property
    def begins(self) -> list[int]:
        """Offset of every layer, and the end."""
        return prefix_begins(self.layers, self.tokens)

    def parts(self, data: Tensor, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, flat."""
        values = data[self.begins[layer] : self.begins[layer + 1]].view(dtype)
        keys = self.tokens * self.layers[layer].key_width
        return values[:keys], values[keys : self.tokens * self.layers[layer].width]


@dataclass(frozen=True)
class PrefixUse:
    """Rows of a device batch that attend to one prefix."""

    room: PrefixRoom
    begin: int
    """Position of the prefix's first token."""

    exact: bool
    """Whether they see it as it was computed, which prompts do."""

    places: Tensor | None
    """int64 [R]: which of the packed tokens; None for all of them."""

    positions: Tensor
    """int64 [R]: their positions."""


@dataclass(frozen=True)
class PrefixBatch:
    """What a device batch has to do with prefixes."""

    computed: Mapping[int, PrefixRoom]
    """Those that it computes, by their index in the batch."""

    uses: Sequence[PrefixUse]


class PrefixCache:
    """The prefixes of a run."""

    def __init__(
        self, layers: tuple[KVLayer, ...], form: KVFormat | None, dtype: torch.dtype, tiers: Tiers, chunk: int
    ) -> None:
        """Nothing is allocated yet.

        Args:
            form: through which prefixes are rounded; None for none.
            chunk: tokens that are rounded at once.
        """
        self._layers, self._form, self._dtype = layers, form, dtype
        self._tiers, self._chunk = tiers, chunk

    def allocate(self, tokens: int) -> PrefixRoom:
        """Make room for a prefix.

        Raises:
            BudgetError: if the device's budget does not allow it.
        """
        return PrefixRoom(tokens, self._layers, self._tensor(tokens))

    def keep(self, room: PrefixRoom, exact: bool) -> None:
        """Keep a prefix that is computed in all layers, in the versions that are still asked for.

        Args:
            exact: whether a prompt is still to be fed behind it.

        Raises:
            StorageError: if a value cannot be packed.
        """
        if self._form is None or room.exact is None:
            return
        if room.rounded is None:
            room.rounded = self._tensor(room.tokens) if exact else room.exact
            self._round(room)
        elif not exact:
            self._tiers.free(room.exact)
        if not exact:
            room.exact = None

    def free(self, room: PrefixRoom) -> None:
        """Give the room of a prefix back."""
        for data in (room.exact, room.rounded):
            if data is not None:
                self._tiers.free(data)
        room.exact = room.rounded = None

    def view(self, layer: int, batch: PrefixBatch) -> LayerPrefixes:
        """What attention needs of the prefixes while it computes a device batch at a layer."""
        return LayerPrefixes(batch, layer, self._dtype)

    def _tensor(self, tokens: int) -> Tensor:
        size = prefix_begins(self._layers, tokens)[-1]
        return self._tiers.tensor(Tier.DEVICE, (size,), torch.uint8, "shared KV cache")

    def _round(self, room: PrefixRoom) -> None:
        """Pack and unpack every layer, a few tokens at a time; all heads at once, as groups may span them."""
        assert self._form is not None and room.exact is not None and room.rounded is not None
        formats = (self._form.keys, self._form.values)
        for layer, groups in enumerate(room.groups):
            sources = room.parts(room.exact, layer, self._dtype)
            targets = room.parts(room.rounded, layer, self._dtype)
            for source, target, spec in zip(sources, targets, formats, strict=True):
                for begin in range(0, room.tokens, self._chunk):
                    part = slice(begin, min(begin + self._chunk, room.tokens))
                    rows = (
                        source.view(groups, room.tokens, -1)[:, part].transpose(0, 1).flatten(1).contiguous()
                    )
                    size = spec.blocks(len(rows)), spec.block_bytes(rows.shape[1])
                    packed = torch.empty(size, dtype=torch.uint8, device=rows.device)
                    try:
                        ops.pack(rows, spec, packed)
                    except ValueError as error:
                        raise StorageError(
                            f"the KV cache of layer {layer} cannot be packed: {error}: use kv_quant=16"
                        ) from error
                    ops.unpack(packed, spec, rows)
                    heads = rows.unflatten(1, (groups, -1)).transpose(0, 1)
                    target.view(groups, room.tokens, -1)[:, part] = heads


@dataclass(frozen=True)
class LayerPrefixes:
    """The prefixes of one device batch at one layer."""

    batch: PrefixBatch
    layer: int
    dtype: torch.dtype

    def write(self, index: int, key: Tensor, value: Tensor) -> bool:
        """Keep keys [T, G, D] and values [T, G, E] of a prefix that is computed; False for a request's."""
        room = self.batch.computed.get(index)
        if room is None:
            return False
        assert room.exact is not None
        room.groups[self.layer] = key.shape[1]
        for target, fresh in zip(room.parts(room.exact, self.layer, self.dtype), (key, value), strict=True):
            target.view(fresh.shape[1], len(fresh), -1).copy_(fresh.transpose(0, 1))
        return True

    def parts(self) -> Iterator[tuple[Tensor, Tensor, PrefixUse]]:
        """Keys [G, n, D] and values [G, n, E] of every prefix that is attended to, and by whom."""
        for use in self.batch.uses:
            data = use.room.exact if use.exact or use.room.rounded is None else use.room.rounded
            assert data is not None
            groups = use.room.groups[self.layer]
            keys, values = use.room.parts(data, self.layer, self.dtype)
            yield keys.view(groups, use.room.tokens, -1), values.view(groups, use.room.tokens, -1), use
