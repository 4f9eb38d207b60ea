"""Times of attention, of prompts and of decoding, on device and host, and of storing keys and values.

Decoding reads keys and values that are in no processor cache, as in a pass, where other layers' lie between.
It is called as the KV cache calls it: all sequences by their addresses where the compiled kernels take them,
else one by one. Knows no model; head shapes are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.kernels.backend import kernels_for
from engine.kernels.calls import AttentionCall, AttentionOptions, CachedSequence, DecodeTable, HeadShape
from engine.kernels.cpu import native
from engine.models.attention import attend_rows
from engine.models.prompt_attention import Prompt, attend_prompts
from engine.profiling.timing import Timing, timed
from engine.spec.kv_format import KVFormat
from engine.units import MIB

LENGTHS = (8, 32, 128, 512, 2048)
"""Tokens of one prompt."""

CONTEXTS = (16, 64, 256, 1024)
SEQUENCES = (1, 4, 16, 64)
SHARING = (1, 4)
"""Query heads of one key-value head."""

FORMS = ("4", "8", "kivi", "float16")
"""Packed formats of the KV cache, measured beside exact numbers."""

HEADS, WIDTH = 12, 64

_PROMPT_TOKENS = 512
_ARENA = 160 * MIB
_CALLS = 8


def options() -> AttentionOptions:
    """Plain causal attention."""
    return AttentionOptions(WIDTH**-0.5)


@torch.inference_mode()
def measure_prompts(
    device: torch.device, dtype: torch.dtype, seconds: float, lengths: Sequence[int] = LENGTHS
) -> dict[int, tuple[float, Timing]]:
    """FLOPs, as the profile counts them, and seconds of attending to prompts, by the length of one."""
    found, kernels = {}, kernels_for(device)
    shape = HeadShape(HEADS, HEADS, WIDTH, WIDTH)

    def run(call: AttentionCall, prompts: Sequence[Prompt]) -> None:
        for start, size in attend_prompts(call, prompts, kernels):
            rows = slice(start, start + size)
            attend_rows(call, rows, call.key[rows], call.value[rows])

    for length in lengths:
        count = max(1, _PROMPT_TOKENS // length)
        parts = [torch.randn(count * length, HEADS, WIDTH).to(device, dtype) for _ in range(3)]
        call = AttentionCall(parts[0], parts[1], parts[2], shape, options(), torch.empty_like(parts[0]))
        prompts = [(index * length, length) for index in range(count)]
        flops = 4.0 * HEADS * WIDTH * count * length * (length + 1) / 2
        found[length] = flops, timed(partial(run, call, prompts), seconds / len(lengths), device)
    return found


@dataclass(frozen=True)
class DecodeSetup:
    """What decoding is measured with."""

    device: torch.device
    dtype: torch.dtype
    form: KVFormat | None
    """How past tokens are packed; None where they are exact."""

    sharing: int
    """Query heads of one key-value head."""

    threads: int | None = None
    """Of attention on the host beside a device; None attends on the device."""

    @property
    def shape(self) -> HeadShape:
        """Of the heads."""
        return HeadShape(HEADS, HEADS // self.sharing, WIDTH, WIDTH)

    @property
    def from_addresses(self) -> bool:
        """Whether the KV cache would have all sequences attended to in one call, by their addresses."""
        one_by_one = self.form is None or self.form.token_by_token
        return self.threads is None and one_by_one and kernels_for(self.device).attends_exact(self.dtype)


@torch.inference_mode()
def measure_decode(
    setup: DecodeSetup,
    seconds: float,
    contexts: Sequence[int] = CONTEXTS,
    sequences: Sequence[int] = SEQUENCES,
) -> dict[tuple[int, int], tuple[float, Timing]]:
    """FLOPs and seconds of one decoding call by (context, sequences)."""
    found = {}
    share = seconds / (len(contexts) * len(sequences))
    for context, count in itertools.product(contexts, sequences):
        calls = list(_calls(setup, context, count))
        flops = 4.0 * HEADS * WIDTH * count * (context + 1)
        found[context, count] = flops, timed(calls, share, setup.device)
    return found


def _calls(setup: DecodeSetup, context: int, count: int) -> Iterator[Callable[[], object]]:
    """Calls that attend to different parts of an arena that no processor cache holds, within its size."""
    device, dtype, form, shape = setup.device, setup.dtype, setup.form, setup.shape
    width = shape.keys + shape.values
    packed = form.packed_tokens(context) if form else 0
    loose = context - packed + 1
    packed_bytes = (
        0 if form is None else packed // form.block_tokens * form.block_bytes(shape.keys, shape.values)
    )
    one = packed_bytes + loose * width * dtype.itemsize
    shared = max(1, -(-count * one // _ARENA))  # several sequences read the same tokens where space is short
    distinct = -(-count // shared)
    rounds = max(1, min(_CALLS, _ARENA // max(1, distinct * one)))
    query = torch.randn(count, shape.heads, WIDTH).to(device, dtype)
    key, value = (torch.randn(count, shape.groups, WIDTH).to(device, dtype) for _ in range(2))
    call = AttentionCall(query, key, value, shape, options(), torch.empty_like(query))
    for _ in range(rounds):
        rows = torch.full((distinct, loose, width), 0.1, dtype=dtype, device=device)
        data = torch.zeros(distinct, packed_bytes, dtype=torch.uint8, device=device)
        past = [CachedSequence(data[i % distinct], packed, rows[i % distinct]) for i in range(count)]
        yield _decode_call(setup, call, past)


def _decode_call(
    setup: DecodeSetup, call: AttentionCall, past: Sequence[CachedSequence]
) -> Callable[[], object]:
    """One call, done the way the KV cache has it done."""
    kernels = kernels_for(setup.device)
    if setup.from_addresses and kernels.decode is not None:
        decode, zeros = kernels.decode, [0] * len(past)
        table = DecodeTable(
            [sequence.packed.data_ptr() for sequence in past], [sequence.packed_tokens for sequence in past],
            [sequence.rows.data_ptr() for sequence in past], [len(past[0].rows) - 1] * len(past), zeros,
        )  # fmt: skip

        def from_addresses() -> None:
            assert past  # whose addresses are used
            decode(call, table, setup.form)

        return from_addresses
    if setup.threads is not None:
        return partial(native.attention, call, past, setup.form, setup.threads)
    if setup.form is not None:
        return partial(kernels.attention, call, past, setup.form)

    def one_by_one() -> None:
        for index, sequence in enumerate(past):
            parts = sequence.rows.split([call.shape.keys, call.shape.values], dim=1)
            keys, values = (part.view(len(part), call.shape.groups, WIDTH) for part in parts)
            attend_rows(call, slice(index, index + 1), keys, values)

    return one_by_one


@torch.inference_mode()
def measure_append(
    device: torch.device, dtype: torch.dtype, form: KVFormat | None, seconds: float, rows: Sequence[int]
) -> dict[int, Timing]:
    """Seconds to store keys and values of some tokens, copied or packed, by the number of values."""
    found, kernels = {}, kernels_for(device)
    keys = values = HEADS * WIDTH

    def store(home: Tensor, key: Tensor, value: Tensor, target: Tensor) -> None:
        home[:, :keys], home[:, keys:] = key, value
        if form is not None:
            kernels.pack_tokens([home], form, keys, values, [target])

    for count in rows:
        if form is not None:
            count = max(1, count // form.block_tokens) * form.block_tokens
        key, value = (torch.randn(count, keys).to(device, dtype) for _ in range(2))
        home = torch.empty(count, keys + values, dtype=dtype, device=device)
        size = count // form.block_tokens * form.block_bytes(keys, values) if form is not None else 0
        target = torch.empty(size, dtype=torch.uint8, device=device)
        call = partial(store, home, key, value, target)
        found[count * (keys + values)] = timed(call, seconds / len(rows), device)
    return found
