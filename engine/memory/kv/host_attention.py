"""Decoding attention on the CPU beside a device with its own memory: the KV cache stays in host memory.

Only queries and fresh rows come down and results go up. The work is a job of a stream of its own, so that
the device attends to its own sequences meanwhile; without a stream it is done at once in the calling thread.

Axes: S sequences with one fresh token each, H query heads, G key-value heads, D and E their widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from engine.kernels import reference_attention
from engine.kernels.calls import AttentionCall, CachedSequence, each_window
from engine.kernels.cpu import native
from engine.memory.kv.regions import LayerPart
from engine.memory.staging import StagingPool
from engine.memory.storage import Tiers
from engine.memory.transfer import Stream
from engine.spec.kv_format import KVFormat
from engine.spec.layout import HOST_ATTENTION_BUFFERS, IN_MEMORY, aligned
from engine.trace import Trace

_CPU = torch.device("cpu")


class HostAttender:
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
            commit: packs the blocks of some parts that the pass filled.
            trace: of the stream's spans; None to attend at once, in the calling thread.
        """
        self._device, self._form, self._commit = tiers.device, form, commit
        self._pool = StagingPool(tiers, HOST_ATTENTION_BUFFERS, stage)
        self._stream = Stream("host_attention", trace, _CPU) if trace is not None else None
        self._attention = (
            partial(native.attention, threads=threads_beside(tiers.device, self._stream is not None))
            if native.available()
            else reference_attention.attention
        )

    def begin(self, parts: Sequence[LayerPart], call: AttentionCall) -> Callable[[], None]:
        """Append the fresh rows to their S sequences and attend; call what is returned, once, to finish.

        Args:
            call: on the device; ``out`` [S, H, E] and ``lse`` are written by what is returned.
        """
        buffer, kind = ExitStack(), call.query.dtype
        query, sinks = call.query, call.options.sinks
        fresh = torch.cat([call.key.flatten(1), call.value.flatten(1)], dim=1)  # [S, keys + values]
        wanted = [
            (query.shape, kind), (fresh.shape, kind), (call.out.shape, kind),
            (query.shape[:2], torch.float32), ((0,) if sinks is None else sinks.shape, kind),
        ]  # fmt: skip
        lengths = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted]
        sizes = [aligned(length, IN_MEMORY) for length in lengths]
        pieces = buffer.enter_context(self._pool.take(sum(sizes))).split(sizes)
        queries, rows, out, lse, staged_sinks = (
            piece[:length].view(dtype).view(shape)
            for piece, length, (shape, dtype) in zip(pieces, lengths, wanted, strict=True)
        )
        queries.copy_(query, non_blocking=True)
        rows.copy_(fresh, non_blocking=True)
        options = call.options
        if sinks is not None:
            staged_sinks.copy_(sinks, non_blocking=True)
            options = replace(options, sinks=staged_sinks)
        keys, values = rows.split([call.shape.keys, call.shape.values], dim=1)
        on_host = AttentionCall(queries, keys, values, call.shape, options, out, lse, call.windows)
        arrived = torch.cuda.current_stream().record_event() if query.is_cuda else None

        def work() -> int:
            if arrived is not None:
                arrived.synchronize()
            self._attend(parts, rows, on_host)
            return 0

        ticket = self._stream.submit(f"attend to {len(parts)} sequences", work) if self._stream else None
        if ticket is None:
            work()

        def finish() -> None:
            with buffer:
                if ticket is not None:
                    ticket.wait()
                call.out.copy_(out, non_blocking=True)
                if call.lse is not None:
                    call.lse.copy_(lse, non_blocking=True)

        return finish

    def close(self) -> None:
        """Stop the stream and wait for its thread to end."""
        if self._stream is not None:
            self._stream.close()

    def _attend(self, parts: Sequence[LayerPart], rows: Tensor, call: AttentionCall) -> None:
        """Append ``rows`` [S, keys + values], attend, and pack what is full."""
        sequences = []
        for index, part in enumerate(parts):
            if len(part.rows):
                part.rows[part.tail] = rows[index]
            else:  # where every token is packed at once, exact rows are not kept
                part.rows = rows[index : index + 1]
            left_out = part.region.padding
            packed = part.data[part.form.packed_bytes(left_out) : part.form.packed_bytes(part.past)]
            packed_tokens = max(0, part.packed_tokens - left_out)
            first_row = left_out if self._form is None else 0
            sequences.append(CachedSequence(packed, packed_tokens, part.rows[first_row : part.tail + 1]))
        each_window(self._attention, call, sequences, self._form)
        self._commit(parts)


@dataclass(frozen=True)
class OnHost:
    """The sequences of one device batch that are attended to on the host, at one layer."""

    host: HostAttender
    parts: Mapping[int, LayerPart]

    @property
    def indices(self) -> Sequence[int]:
        """Their places among the sequences of the batch."""
        return tuple(self.parts)

    def begin(self, call: AttentionCall) -> Callable[[], None]:
        """See `HostAttender.begin`."""
        return self.host.begin(tuple(self.parts.values()), call)


def threads_beside(device: torch.device, beside: bool = True) -> int:
    """Number of threads: all but one beside a GPU, half where the device is the CPU, too."""
    most = torch.get_num_threads()
    if not beside:
        return most
    return max(1, most - 1 if device.type == "cuda" else most // 2)
