"""Attention of prompts and of decoding, on the device and on the host beside it, and keeping keys and values.

Decoding reads keys and values that are not in a cache, as in a pass, where other layers' lie between; it is
done the way the KV cache has it done: all sequences from addresses where the compiled kernels take that,
else one by one. Knows no model; head shapes are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from engine.kernels import ops
from engine.kernels.calls import AttentionOptions, CachedSequence, DecodeTable, HeadShape
from engine.kernels.cpu import native
from engine.models.attention import attend
from engine.models.prompt_attention import attend_prompts
from engine.profiling.timing import Timing, timed, timed_in_turn
from engine.spec.kv_format import KVFormat
from engine.units import MIB

LENGTHS = (8, 32, 128, 512, 2048)
"""Tokens of one prompt."""

CONTEXTS = (16, 64, 256, 1024)
SEQUENCES = (1, 4, 16, 64)
SHARING = (1, 4)
"""Query heads of one key-value head."""

FORMS = ("4", "8", "kivi", "float16")
"""Packed formats of the KV cache; exact numbers are measured besides."""

HEADS, WIDTH = 12, 64

_PROMPT_TOKENS = 512
_ARENA = 160 * MIB
_CALLS = 8
_NOTHING = torch.empty(0, dtype=torch.uint8)


def options() -> AttentionOptions:
    """Plain causal attention."""
    return AttentionOptions(WIDTH**-0.5)


@torch.inference_mode()
def measure_prompts(
    device: torch.device, dtype: torch.dtype, seconds: float, lengths: Sequence[int] = LENGTHS
) -> dict[int, tuple[float, Timing]]:
    """FLOPs, as the profile counts them, and seconds of attending to prompts, by the length of one."""
    found = {}
    for length in lengths:
        count = max(1, _PROMPT_TOKENS // length)
        tokens = count * length
        query, key, value = (
            torch.randn(tokens, HEADS, WIDTH).to(device, dtype).transpose(0, 1) for _ in range(3)
        )
        out = torch.empty(tokens, HEADS, WIDTH, dtype=dtype, device=device)
        prompts = [(index * length, length) for index in range(count)]

        def run(prompts=prompts, query=query, key=key, value=value, out=out) -> None:  # type: ignore[no-untyped-def]
            for start, size in attend_prompts(prompts, query, key, value, options(), out):
                rows = slice(start, start + size)
                attend(query[:, rows], key[:, rows].transpose(0, 1), value[:, rows].transpose(0, 1),
                       out[rows], options())  # fmt: skip

        flops = 4.0 * HEADS * WIDTH * count * length * (length + 1) / 2
        found[length] = flops, timed(run, seconds / len(lengths), device)
    return found


@torch.inference_mode()
def measure_decode(
    device: torch.device,
    dtype: torch.dtype,
    form: KVFormat | None,
    sharing: int,
    seconds: float,
    contexts: Sequence[int] = CONTEXTS,
    sequences: Sequence[int] = SEQUENCES,
    threads: int | None = None,
) -> dict[tuple[int, int], tuple[float, Timing]]:
    """FLOPs and seconds of one decoding call by (context, sequences).

    Args:
        threads: measures attention on the host beside a device; None attends on the device.
    """
    found = {}
    share = seconds / (len(contexts) * len(sequences))
    shape = HeadShape(HEADS, HEADS // sharing, WIDTH, WIDTH)
    for context, count in itertools.product(contexts, sequences):
        calls = list(_calls(device, dtype, form, shape, context, count, threads))
        flops = 4.0 * HEADS * WIDTH * count * (context + 1)
        found[context, count] = flops, timed_in_turn(calls, share, device)
    return found


def _calls(
    device: torch.device, dtype: torch.dtype, form: KVFormat | None, shape: HeadShape, context: int,
    count: int, threads: int | None,
) -> Iterator[Callable[[], object]]:  # fmt: skip
    """Calls that attend to different parts of an arena that no cache holds, as far as there is room."""
    width, size = shape.keys + shape.values, dtype.itemsize
    packed = form.packed_tokens(context) if form else 0
    loose = context - packed + 1
    packed_bytes = (
        0 if form is None else packed // form.block_tokens * form.block_bytes(shape.keys, shape.values)
    )
    row_bytes = loose * width * size
    one = count * (packed_bytes + row_bytes)
    shared = max(1, -(-one // _ARENA))  # several sequences may read the same tokens where there is no room
    distinct = -(-count // shared)
    rounds = max(1, min(_CALLS, _ARENA // max(1, distinct * (packed_bytes + row_bytes))))
    query = torch.randn(count, shape.heads, WIDTH).to(device, dtype)
    key, value = (torch.randn(count, shape.groups, WIDTH).to(device, dtype) for _ in range(2))
    out = torch.empty(count, shape.heads, WIDTH, dtype=dtype, device=device)
    for _ in range(rounds):
        rows = torch.full((distinct, loose, width), 0.1, dtype=dtype, device=device)
        data = torch.zeros(distinct, packed_bytes, dtype=torch.uint8, device=device)
        places = [index % distinct for index in range(count)]
        one_by_one = form is None or (form.block_tokens == 1 and not form.tail_tokens)
        if threads is None and one_by_one and ops.attends_exact(device, dtype):
            yield _from_addresses(query, key, value, rows, data, places, packed, form, shape, out)
        else:
            yield _from_tensors(query, rows, data, places, packed, form, shape, out, threads)


def _from_addresses(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, data: Tensor, places: Sequence[int],
    packed: int, form: KVFormat | None, shape: HeadShape, out: Tensor,
) -> Callable[[], object]:  # fmt: skip
    count = len(places)
    table = DecodeTable(
        [data[place].data_ptr() for place in places], [packed] * count,
        [rows[place].data_ptr() for place in places], [rows.shape[1] - 1] * count, [0] * count,
    )  # fmt: skip

    def run() -> None:
        assert rows is not None and data is not None  # whose addresses are used
        ops.decode(query, key, value, table, form, shape, options(), out)

    return run


def _from_tensors(
    query: Tensor, rows: Tensor, data: Tensor, places: Sequence[int], packed: int, form: KVFormat | None,
    shape: HeadShape, out: Tensor, threads: int | None,
) -> Callable[[], object]:  # fmt: skip
    sequences = [CachedSequence(data[place], packed, rows[place]) for place in places]
    known = form or KVFormat()

    def on_host() -> None:
        native.attention(query, sequences, known, shape, options(), out, threads)

    def packed_on_device() -> None:
        ops.attention(query, sequences, known, shape, options(), out)

    def exact_on_device() -> None:
        for index, sequence in enumerate(sequences):
            parts = sequence.rows.split([shape.keys, shape.values], dim=1)
            keys, values = (part.view(len(part), shape.groups, WIDTH) for part in parts)
            attend(query[index][:, None], keys, values, out[index : index + 1], options())

    if threads is not None:
        return on_host
    return exact_on_device if form is None else packed_on_device


@torch.inference_mode()
def measure_append(
    device: torch.device, dtype: torch.dtype, form: KVFormat | None, seconds: float, rows: Sequence[int]
) -> dict[int, Timing]:
    """Seconds of keeping keys and values of so many tokens, by the number of values: copied, or packed."""
    found = {}
    keys = values = HEADS * WIDTH
    for count in rows:
        if form is not None:
            count = max(1, count // form.block_tokens) * form.block_tokens
        key, value = (torch.randn(count, keys).to(device, dtype) for _ in range(2))
        home = torch.empty(count, keys + values, dtype=dtype, device=device)

        def copy(home=home, key=key, value=value) -> None:  # type: ignore[no-untyped-def]
            home[:, :keys] = key
            home[:, keys:] = value

        call: Callable[[], object] = copy
        if form is not None:
            copy()
            size = count // form.block_tokens * form.block_bytes(keys, values)
            target = torch.empty(size, dtype=torch.uint8, device=device)

            def pack(home=home, target=target, copy=copy) -> None:  # type: ignore[no-untyped-def]
                copy()
                ops.pack_tokens([home], form, keys, values, [target])

            call = pack
        found[count * (keys + values)] = timed(call, seconds / len(rows), device)
    return found
