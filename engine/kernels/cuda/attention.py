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


class Tile(NamedTuple):
    """One head's keys, or values, in one step of a program: [tokens, padded]."""

    tokens: int
    width: int
    padded: int
    """The width's next power of two, at least 16."""


class Constants(NamedTuple):
    """How cached tokens lie and are attended to; a compile-time constant."""

    block_tokens: int
    block_bytes: int
    key_bytes: int
    per_group: int
    """Query heads of one key-value head."""

    heads: int
    """The next power of two, at least 16."""

    capped: bool
    """Whether scores have a soft cap."""

    aligned: bool
    """Whether all addresses and strides are multiples of 16."""


@triton.jit
def _packed_tile(blocks, start, tokens, head,
                 CONSTANTS: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """One head's numbers of a tile of packed tokens from ``start``, a multiple of its length.

    The tile is cut along groups into the largest parts that share a scale: powers of two that divide
    both the group and the head.
    """
    common: tl.constexpr = FORM.group | (TILE.width if FORM.along_row else TILE.tokens)
    part: tl.constexpr = common & -common  # the lowest bit that either has
    if FORM.along_row:
        token = (start + tl.arange(0, TILE.tokens))[:, None, None]
        column = head * TILE.width + (tl.arange(0, TILE.padded // part) * part)[None, :, None]
        within = tl.arange(0, part)[None, None, :]
    else:
        token = (start + tl.arange(0, TILE.tokens // part) * part)[:, None, None]
        column = head * TILE.width + tl.arange(0, TILE.padded)[None, None, :]
        within = tl.arange(0, part)[None, :, None]
    stored = (token < tokens) & (column < (head + 1) * TILE.width)
    block = blocks + (token // CONSTANTS.block_tokens).to(tl.int64) * CONSTANTS.block_bytes
    if FORM.along_row:
        block += token % CONSTANTS.block_tokens * FORM.block_bytes
        tile = decode(block, column // FORM.group, column % FORM.group + within, stored, within < part, FORM)
    else:
        tile = decode(block, column, token % FORM.group + within, stored, within < part, FORM)
    return tl.reshape(tile, [TILE.tokens, TILE.padded])


@triton.jit
def _row_tile(rows, start, count, stride, first, TILE: tl.constexpr):
    """A tile of exact tokens from ``start``: their columns from ``first``."""
    token = start + tl.arange(0, TILE.tokens)[:, None]
    column = tl.arange(0, TILE.padded)[None, :]
    mask = (token < count) & (column < TILE.width)
    return tl.load(rows + token * stride + first + column, mask=mask, other=0)


@triton.jit
def _absorb(query, keys, values, visible, scoring, softmax, CAPPED: tl.constexpr):
    """One tile of tokens into the running softmax: its highest score, sum of weights, weighted values."""
    scale, softcap = scoring
    highest, total, gathered = softmax
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
def _query_tile(query, heads, member, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """The queries of the heads that share a key-value head: [heads, padded]."""
    channel = tl.arange(0, TILE.padded)
    mask = (member < CONSTANTS.per_group)[:, None] & (channel < TILE.width)[None, :]
    return tl.load(query + heads[:, None] * TILE.width + channel[None, :], mask=mask, other=0)


@triton.jit
def _store(parts, lse, line, member, softmax, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write one part's mean values [heads, padded] and their log-sum-exp [heads]."""
    highest, total, gathered = softmax
    divisor = tl.where(total > 0, total, 1.0)
    logarithm = tl.where(total > 0, highest + tl.log(divisor), float("-inf"))
    tl.store(lse + line, logarithm, mask=member < CONSTANTS.per_group)
    feature = tl.arange(0, TILE.padded)
    tl.store(
        parts + line[:, None] * TILE.width + feature[None, :], gathered / divisor[:, None],
        mask=(member < CONSTANTS.per_group)[:, None] & (feature < TILE.width)[None, :],
    )  # fmt: skip


@triton.jit
def attend(query, table, parts, lse, scale, window, softcap, splits,
           CONSTANTS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
           KEY_TILE: tl.constexpr, VALUE_TILE: tl.constexpr):  # fmt: skip
    """Attention of one key-value head over one part: mean values, and their log-sum-exp.

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
    member = tl.arange(0, CONSTANTS.heads)
    heads = (sequence * groups + head) * CONSTANTS.per_group + member
    queries = _query_tile(query, heads, member, CONSTANTS, KEY_TILE)
    highest = tl.full([CONSTANTS.heads], float("-inf"), tl.float32)
    total = tl.zeros([CONSTANTS.heads], tl.float32)
    gathered = tl.zeros([CONSTANTS.heads, VALUE_TILE.padded], tl.float32)
    TOKENS: tl.constexpr = KEY_TILE.tokens
    place = tl.arange(0, TOKENS)
    if split < splits:
        blocks = tl.load(entry).to(tl.pointer_type(tl.uint8))
        if CONSTANTS.aligned:
            blocks = tl.multiple_of(blocks, 16)
        oldest = first // TOKENS
        tiles = tl.cdiv(tl.maximum(tl.cdiv(packed, TOKENS) - oldest, 0), splits)
        begin = (oldest + split * tiles) * TOKENS
        for start in range(begin, tl.minimum(begin + tiles * TOKENS, packed), TOKENS):
            keys = _packed_tile(blocks, start, packed, head, CONSTANTS, KEYS, KEY_TILE)
            values = _packed_tile(
                blocks + CONSTANTS.key_bytes, start, packed, head, CONSTANTS, VALUES, VALUE_TILE
            )
            visible = (start + place >= first) & (start + place < packed)
            highest, total, gathered = _absorb(
                queries, keys.to(query.dtype.element_ty), values.to(query.dtype.element_ty), visible,
                (scale, softcap), (highest, total, gathered), CONSTANTS.capped,
            )  # fmt: skip
    else:
        rows = tl.load(entry + 2).to(tl.pointer_type(query.dtype.element_ty))
        stride = tl.load(entry + 4)
        if CONSTANTS.aligned:
            rows, stride = tl.multiple_of(rows, 16), tl.multiple_of(stride, 16)
        for start in range(tl.maximum(first - packed, 0) // TOKENS * TOKENS, count, TOKENS):
            keys = _row_tile(rows, start, count, stride, head * KEY_TILE.width, KEY_TILE)
            column = groups * KEY_TILE.width + head * VALUE_TILE.width
            values = _row_tile(rows, start, count, stride, column, VALUE_TILE)
            visible = (packed + start + place >= first) & (start + place < count)
            highest, total, gathered = _absorb(
                queries, keys, values, visible, (scale, softcap), (highest, total, gathered), CONSTANTS.capped
            )

    line = split * tl.num_programs(0) * groups * CONSTANTS.per_group + heads
    _store(parts, lse, line, member, (highest, total, gathered), CONSTANTS, VALUE_TILE)
