"""What attention sees of the KV cache: one device batch at one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from engine.errors import StorageError
from engine.kernels.backend import Kernels
from engine.kernels.calls import AttentionCall, CachedSequence, DecodeTable
from engine.memory.kv.host_attention import OnHost
from engine.memory.kv.regions import LayerPart
from engine.spec.kv_format import KVFormat

_NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class Parts:
    """The sequences of a device batch, one by one."""

    of: Mapping[int, LayerPart]
    """Those that the device attends to, by their index in the batch; none of those without a cache."""

    in_place: Sequence[LayerPart]
    """Those of them that are attended to where they are kept."""

    host: OnHost | None
    """Those that are attended to on the host; None for none."""


class BatchKeyValues:
    """The `KeyValues` of one device batch at one layer, over a KV cache."""

    def __init__(
        self,
        kernels: Kernels,
        form: KVFormat | None,
        table: DecodeTable | None,
        find_parts: Callable[[], Parts],
        commit: Callable[[Sequence[LayerPart]], None],
    ) -> None:
        """Take what the cache knows of the batch.

        Args:
            table: where the whole batch can decode in one call; parts are then found only on demand.
            commit: packs the full blocks of parts that were attended to in place.
        """
        self.kernels, self.form = kernels, form
        self._table, self._find_parts, self._commit = table, find_parts, commit

    @cached_property
    def _parts(self) -> Parts:
        return self._find_parts()

    @property
    def host(self) -> OnHost | None:
        """Its sequences that are attended to on the host; None for none."""
        return None if self._table is not None else self._parts.host

    def decode(self, call: AttentionCall) -> bool:
        """Append one token per sequence and attend for all at once; False if this batch cannot.

        Raises:
            StorageError: if a value cannot be packed.
        """
        if self._table is None:
            return False
        assert self.kernels.decode is not None
        try:
            self.kernels.decode(call, self._table, self.form)
        except ValueError as error:
            raise StorageError(f"the KV cache cannot be packed: {error}: use kv_quant=16") from error
        return True

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | CachedSequence:
        """Append fresh keys [T, G, D] and values [T, G, E] of a sequence; return all n tokens'."""
        part = self._parts.of.get(index)
        if part is None:
            return key, value
        width, end = part.form.key_width, part.tail + len(key)
        padding = part.region.padding
        part.rows[part.tail : end, :width] = key.reshape(len(key), -1)
        part.rows[part.tail : end, width:] = value.reshape(len(value), -1)
        if self.form is None:
            rows = part.rows[padding:end]
            if part.past and len(key) == 1 and self.kernels.attends_exact(rows.dtype):
                return CachedSequence(_NOTHING, 0, rows)
            return rows[:, :width].unflatten(1, key.shape[1:]), rows[:, width:].unflatten(1, value.shape[1:])
        if not part.past:
            return key[padding:], value[padding:]
        assert len(key) == 1, "a packed past is read one token at a time"
        packed = part.data[part.form.packed_bytes(padding) : part.form.packed_bytes(part.past)]
        return CachedSequence(packed, part.packed_tokens - padding, part.rows[:end])

    def commit(self) -> None:
        """Pack the full blocks of the sequences that are attended to in place."""
        self._commit(self._parts.in_place)
