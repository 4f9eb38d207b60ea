"""Inputs of the tests of the C kernels, and the references' results."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import reference
from engine.kernels.calls import AttentionCall, AttentionOptions, CachedSequence, HeadShape, PackedMatrix
from engine.spec.kv_format import KVFormat
from engine.spec.quant import WHOLE_ROW, Along, Fit, Offset, QuantSpec

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""For properties of kernels, whose fixtures hold for all examples."""


@st.composite
def specs(draw: st.DrawFn, fits: tuple[Fit, ...] = (Fit.RANGE,)) -> QuantSpec:
    """Any format, activations of 16 bits."""
    along = draw(st.sampled_from(Along))
    sizes = [8, 16, 24, 32, 64, 128] + ([320, WHOLE_ROW] if along is Along.ROW else [])
    return QuantSpec(
        draw(st.sampled_from((2, 3, 4, 8))),
        draw(st.sampled_from(sizes)),
        draw(st.sampled_from(Offset)),
        along,
        draw(st.sampled_from(fits)),
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_call(
    query: Tensor, shape: HeadShape, options: AttentionOptions, out: Tensor, lse: Tensor | None = None
) -> AttentionCall:
    """A call of kernels that find the fresh tokens' keys and values among the cached ones."""
    unread = torch.empty(0)
    return AttentionCall(query, unread, unread, shape, options, out, lse)


def empty_packed(spec: QuantSpec, rows: int, width: int) -> Tensor:
    return torch.full((spec.blocks(rows), spec.block_bytes(width)), 0xA5, dtype=torch.uint8)


def packed_matrix(spec: QuantSpec, rows: int, width: int, seed: int = 0) -> PackedMatrix:
    data = reference.pack(noise(rows, width, seed=seed), spec, empty_packed(spec, rows, width))
    return PackedMatrix(data, spec, rows, width)


def packed_tokens(rows: Tensor, form: KVFormat, keys: int, values: int) -> Tensor:
    """Full blocks of tokens [T, keys + values], packed by the reference into a flat uint8 tensor."""
    count, key_bytes = len(rows) // form.block_tokens, form.key_bytes(keys)
    blocks = torch.empty(count, form.block_bytes(keys, values), dtype=torch.uint8)
    for index, block in enumerate(blocks):
        tokens = rows[index * form.block_tokens : (index + 1) * form.block_tokens]
        reference.pack(tokens[:, :keys], form.keys, block[:key_bytes].view(-1, form.keys.block_bytes(keys)))
        reference.pack(
            tokens[:, keys:], form.values, block[key_bytes:].view(-1, form.values.block_bytes(values))
        )
    return blocks.view(-1)


def cached_sequence(form: KVFormat, shape: HeadShape, tokens: int, seed: int = 0) -> CachedSequence:
    """A sequence of ``tokens`` tokens: full blocks are packed, but never the newest token."""
    rows = noise(tokens, shape.keys + shape.values, seed=seed)
    packed = (tokens - 1) // form.block_tokens * form.block_tokens
    strided = torch.cat([rows[packed:], noise(tokens - packed, 3)], dim=1)[:, :-3]
    return CachedSequence(packed_tokens(rows[:packed], form, shape.keys, shape.values), packed, strided)
