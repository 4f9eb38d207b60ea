"""Decoding attention on the CPU beside a device with a memory of its own: the KV cache stays in host memory.

Only queries and fresh rows come down and results go up. The work is a job of a stream of its own, so that
the device attends to its own sequences meanwhile; without a stream it is done at once, where it is asked for.

Axes: S sequences with one fresh token each, H query heads, G key-value heads, D and E their widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import reference_attention
from engine.kernels.calls import AttentionOptions, CachedSequence, HeadShape
from engine.kernels.cpu import native
from engine.memory.kv.regions import LayerPart
from engine.memory.staging import StagingPool
from engine.memory.storage import Tiers
from engine.memory.transfer import Stream
from engine.spec.kv_format import KVFormat
from engine.spec.layout import HOST_ATTENTION_BUFFERS, IN_MEMORY, aligned
from engine.trace import Trace

_CPU = torch.device("cpu")


class HostAttention:
    """Attends to sequences whose KV cache lies in host memory, one device batch's at a time."""

    def __init__(
        self,
        tiers: Tiers,
        form: KVFormat | None,
        stage: int,
        commit: Callable[[Sequence[LayerPart]], None],
        trace: Trace | None,
    ) -> None:
        """Allocate what queries, rows and results pass through, and start the stream.

        Args:
            stage: bytes of one such buffer.
            commit: packs what a pass filled of some parts.
            trace: of the stream's spans; None to attend at once, in the thread that asks.
        """
        self._device, self._form, self._commit = tiers.device, form, commit
        self._pool = StagingPool(tiers, HOST_ATTENTION_BUFFERS, stage)
        self._stream = Stream("host_attention", trace, _CPU) if trace is not None else None
        self._threads = threads_beside(tiers.device, self._stream is not None)

    def begin(
        self,
        parts: Sequence[LayerPart],
        query: Tensor,  # [S, H, D]
        key: Tensor,  # [S, G, D]
        value: Tensor,  # [S, G, E]
        shape: HeadShape,
        options: AttentionOptions,
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Append the fresh rows to their sequences and attend.

        Call what is returned once, for [S, H, E] and the lse, float32 [S, H]; see `ops.attention`.
        """
        buffer = ExitStack()
        count, kind = len(parts), query.dtype
        fresh = torch.cat([key.reshape(count, -1), value.reshape(count, -1)], dim=1)
        sinks = query.new_empty(0) if options.sinks is None else options.sinks.to(kind)
        out_shape = (count, shape.heads, shape.value_width)
        sizes = [query.numel(), fresh.numel(), count * shape.heads * shape.value_width, sinks.numel()]
        sizes.append(count * shape.heads)
        kinds = [*[kind] * 4, torch.float32]
        lengths = [size * each.itemsize for size, each in zip(sizes, kinds, strict=True)]
        sizes = [aligned(length, IN_MEMORY) for length in lengths]
        parts_taken = buffer.enter_context(self._pool.take(sum(sizes))).split(sizes)
        places = [
            buffer_bytes[:length].view(each)
            for buffer_bytes, length, each in zip(parts_taken, lengths, kinds, strict=True)
        ]
        queries, rows, out = (
            places[0].view(query.shape),
            places[1].view(fresh.shape),
            places[2].view(out_shape),
        )
        lse = places[4].view(count, shape.heads)
        queries.copy_(query, non_blocking=True)
        rows.copy_(fresh, non_blocking=True)
        places[3].copy_(sinks, non_blocking=True)
        on_host = options if options.sinks is None else dataclasses.replace(options, sinks=places[3])
        arrived = torch.cuda.current_stream().record_event() if query.is_cuda else None

        def work() -> int:
            if arrived is not None:
                arrived.synchronize()
            self._attend(parts, queries, rows, shape, on_host, out, lse)
            return 0

        ticket = self._stream.submit(f"attend to {count} sequences", work) if self._stream else None
        if ticket is None:
            work()

        def result() -> tuple[Tensor, Tensor]:
            with buffer:
                if ticket is not None:
                    ticket.wait()
                both = (part.to(self._device, non_blocking=True, copy=True) for part in (out, lse))
                return next(both), next(both)

        return result

    def close(self) -> None:
        """Stop the stream and wait for its thread to end."""
        if self._stream is not None:
            self._stream.close()

    def _attend(
        self,
        parts: Sequence[LayerPart],
        queries: Tensor,
        rows: Tensor,  # [S, keys + values]
        shape: HeadShape,
        options: AttentionOptions,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        sequences = []
        for index, part in enumerate(parts):
            if len(part.rows):
                part.rows[part.tail] = rows[index]
            else:  # no exact row has a place of its own where every token is packed at once
                part.rows = rows[index : index + 1]
            left_out = part.region.padding
            packed = part.data[part.form.packed_bytes(left_out) : part.form.packed_bytes(part.past)]
            packed_tokens = max(0, part.packed_tokens - left_out)
            first_row = left_out if self._form is None else 0
            sequences.append(CachedSequence(packed, packed_tokens, part.rows[first_row : part.tail + 1]))
        form = self._form or KVFormat()
        if native.available():
            native.attention(queries, sequences, form, shape, options, out, self._threads, lse)
        else:
            reference_attention.attention(queries, sequences, form, shape, options, out, lse)
        self._commit(parts)


@dataclass(frozen=True)
class OnHost:
    """The sequences of one device batch that are attended to on the host, at one layer."""

    host: HostAttention
    parts: Mapping[int, LayerPart]

    @property
    def indices(self) -> Sequence[int]:
        """Which they are of the batch."""
        return tuple(self.parts)

    def begin(
        self, query: Tensor, key: Tensor, value: Tensor, shape: HeadShape, options: AttentionOptions
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """See `HostAttention.begin`."""
        return self.host.begin(tuple(self.parts.values()), query, key, value, shape, options)


def threads_beside(device: torch.device, beside: bool = True) -> int:
    """All but one where the device computes by itself, half where it is the CPU, too."""
    most = torch.get_num_threads()
    if not beside:
        return most
    return max(1, most - 1 if device.type == "cuda" else most // 2)
