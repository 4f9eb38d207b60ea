"""The Triton kernel of attention over packed and exact tokens, one query per sequence.

Each program serves the query heads of one key-value head of one sequence over a part of its tokens (the
packed ones in parts, the exact ones last) with a running softmax; `engine.kernels.cuda.gpu` joins the parts.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton: what is annotated are the compile-time constants)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from engine.kernels.cuda.triton_kernels import decode


class Cache(NamedTuple):
    """How cached tokens lie; a compile-time constant. Padded widths are powers of two."""

    block_tokens: int
    block_bytes: int
    key_bytes: int
    key_width: int
    key_padded: int
    value_width: int
    value_padded: int


@triton.jit
def _packed_tile(blocks, start, tokens, head, CACHE: tl.constexpr, FORM: tl.constexpr,
                 WIDTH: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """One head's numbers of ``TOKENS`` packed tokens from ``start``, a multiple of it: [TOKENS, PADDED].

    The tile is cut along groups into the largest parts that share a scale: powers of two that divide
    both the group and the head.
    """
    common: tl.constexpr = FORM.group | (WIDTH if FORM.along_row else TOKENS)
    part: tl.constexpr = common & -common  # the lowest bit that either has
    if FORM.along_row:
        token = (start + tl.arange(0, TOKENS))[:, None, None]
        column = head * WIDTH + (tl.arange(0, PADDED // part) * part)[None, :, None]
        within = tl.arange(0, part)[None, None, :]
    else:
        token = (start + tl.arange(0, TOKENS // part) * part)[:, None, None]
        column = head * WIDTH + tl.arange(0, PADDED)[None, None, :]
        within = tl.arange(0, part)[None, :, None]
    stored = (token < tokens) & (column < (head + 1) * WIDTH)
    block = blocks + (token // CACHE.block_tokens).to(tl.int64) * CACHE.block_bytes
    if FORM.along_row:
        block += token % CACHE.block_tokens * FORM.block_bytes
        tile = decode(block, column // FORM.group, column % FORM.group + within, stored, within < part, FORM)
    else:
        tile = decode(block, column, token % FORM.group + within, stored, within < part, FORM)
    return tl.reshape(tile, [TOKENS, PADDED])


@triton.jit
def _row_tile(rows, start, count, stride, first,
              WIDTH: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Columns from ``first`` of ``TOKENS`` exact tokens from ``start``: [TOKENS, PADDED]."""
    token = start + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    return tl.load(rows + token * stride + first + column, mask=(token < count) & (column < WIDTH), other=0)


@triton.jit
def _absorb(query, keys, values, visible, scale, softcap, CAPPED: tl.constexpr, highest, total, gathered):
    """One tile of tokens into the running softmax: its highest score, sum of weights, weighted values."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if CAPPED:
        scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))  # softcap * tanh(scores / softcap)
    scores = tl.where(visible[None, :], scores, float("-inf"))
    raised = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp(scores - base[:, None])
    fade = tl.exp(highest - base)
    gathered = tl.dot(weights.to(query.dtype), values, gathered * fade[:, None], input_precision="ieee")
    return raised, total * fade + tl.sum(weights, 1), gathered


@triton.jit
def attend(query, table, parts, lse, scale, window, softcap, splits,
           ALIGNED: tl.constexpr, CAPPED: tl.constexpr,
           CACHE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
           PER_GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Attention of one key-value head over one part: mean values, and the logarithm of the sum of weights.

    Args:
        query: [S, H, D], contiguous.
        table: int64 [S, 5]: address of the packed blocks, packed tokens, address, count and stride of rows.
        parts: float32 [splits + 1, S, H, E].
        lse: float32 [splits + 1, S, H].
    """
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entry = table + sequence * 5
    packed = tl.load(entry + 1).to(tl.int32)
    count = tl.load(entry + 3).to(tl.int32)
    first = tl.maximum(packed + count - window, 0)  # the oldest token that is visible

    groups = tl.num_programs(1)
    member = tl.arange(0, HEADS)
    heads = (sequence * groups + head) * PER_GROUP + member
    channel = tl.arange(0, CACHE.key_padded)
    asked = tl.load(
        query + heads[:, None] * CACHE.key_width + channel[None, :],
        mask=(member < PER_GROUP)[:, None] & (channel < CACHE.key_width)[None, :], other=0,
    )  # fmt: skip
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    gathered = tl.zeros([HEADS, CACHE.value_padded], tl.float32)
    place = tl.arange(0, TOKENS)
    if split < splits:
        blocks = tl.load(entry).to(tl.pointer_type(tl.uint8))
        if ALIGNED:
            blocks = tl.multiple_of(blocks, 16)
        oldest = first // TOKENS
        tiles = tl.cdiv(tl.maximum(tl.cdiv(packed, TOKENS) - oldest, 0), splits)
        begin = (oldest + split * tiles) * TOKENS
        for start in range(begin, tl.minimum(begin + tiles * TOKENS, packed), TOKENS):
            keys = _packed_tile(
                blocks, start, packed, head, CACHE, KEYS, CACHE.key_width, CACHE.key_padded, TOKENS
            )
            values = _packed_tile(
                blocks + CACHE.key_bytes, start, packed, head,
                CACHE, VALUES, CACHE.value_width, CACHE.value_padded, TOKENS,
            )  # fmt: skip
            visible = (start + place >= first) & (start + place < packed)
            highest, total, gathered = _absorb(
                asked, keys.to(query.dtype.element_ty), values.to(query.dtype.element_ty), visible,
                scale, softcap, CAPPED, highest, total, gathered,
            )  # fmt: skip
    else:
        rows = tl.load(entry + 2).to(tl.pointer_type(query.dtype.element_ty))
        stride = tl.load(entry + 4)
        if ALIGNED:
            rows, stride = tl.multiple_of(rows, 16), tl.multiple_of(stride, 16)
        for start in range(tl.maximum(first - packed, 0) // TOKENS * TOKENS, count, TOKENS):
            keys = _row_tile(
                rows, start, count, stride, head * CACHE.key_width, CACHE.key_width, CACHE.key_padded, TOKENS
            )
            values = _row_tile(
                rows, start, count, stride, groups * CACHE.key_width + head * CACHE.value_width,
                CACHE.value_width, CACHE.value_padded, TOKENS,
            )  # fmt: skip
            visible = (packed + start + place >= first) & (start + place < count)
            highest, total, gathered = _absorb(
                asked, keys, values, visible, scale, softcap, CAPPED, highest, total, gathered
            )

    line = split * tl.num_programs(0) * groups * PER_GROUP + heads
    divisor = tl.where(total > 0, total, 1.0)
    logarithm = tl.where(total > 0, highest + tl.log(divisor), float("-inf"))
    tl.store(lse + line, logarithm, mask=member < PER_GROUP)
    feature = tl.arange(0, CACHE.value_padded)
    tl.store(
        parts + line[:, None] * CACHE.value_width + feature[None, :], gathered / divisor[:, None],
        mask=(member < PER_GROUP)[:, None] & (feature < CACHE.value_width)[None, :],
    )  # fmt: skip
