"""Bytes of host memory while loading, and of a pass's temporaries outside the plan's buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.spec.hardware import Tier
from engine.spec.layout import (
    CONVERT_VALUES,
    LOGITS_ROWS,
    QUERY_ROWS,
    STORE_BUFFERS,
    STORE_PIECE,
    KeptWeight,
    aligned,
)
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.quant import QuantSpec
from engine.units import KIB, MIB

_SCRATCH_TOKENS, _SCRATCH_PANELS = 512, 4 * MIB

_LOADING_BASE = 64 * KIB
"""Small tensors that are alive while a checkpoint is read: a model's own buffers, headers."""


def loading_bytes(spec: ModelSpec, policy: Policy, weights: Mapping[str, KeptWeight], unified: bool) -> int:
    """Host memory while weights are brought in, beside those in place.

    A tensor that goes through transformers' conversion is held as parts, whole and packed; one that a file
    holds as it is kept is read in place, and by way of a copy if it is converted or goes to a device.
    """
    streamed = [
        kept for kept in weights.values() if not kept.tensor.in_file or isinstance(kept.form, QuantSpec)
    ]
    copied = [
        kept.tensor.nbytes
        for kept in weights.values()
        if kept.tier is not Tier.DISK
        and (not unified or (kept.form is None and kept.dtype != kept.tensor.dtype))
    ]
    largest = max((kept.tensor.nbytes for kept in streamed), default=0)
    loading = max(3 * largest, max(copied, default=0)) + _LOADING_BASE + _store_bytes(spec, streamed)
    return loading + (_convert_bytes(spec) if streamed and _packs_weights(spec, policy) else 0)


def _store_bytes(spec: ModelSpec, streamed: Sequence[KeptWeight]) -> int:
    """Buffers through which weights are written to the packed store, where they have to be."""
    packed = any(isinstance(kept.form, QuantSpec) for kept in streamed)
    if not any(kept.tier is Tier.DISK for kept in streamed) and not (packed and spec.weights == "trained"):
        return 0
    sizes = (kept.nbytes if isinstance(kept.form, QuantSpec) else kept.tensor.nbytes for kept in streamed)
    return STORE_BUFFERS * min(STORE_PIECE, sum(map(aligned, sizes)))


def workspace_bytes(
    spec: ModelSpec,
    policy: Policy,
    tokens: int,
    context: int,
    computes_packed: bool = False,
    fused: bool = False,
    longest: int = 0,
) -> int:
    """Bytes of temporaries while a stage computes a device batch of packed tokens, and while streams convert.

    Counted are the tensors that live at once in transformers' layers: about eight of the hidden
    width, three of the inner width (nine with experts, and every expert's input and output twice), queries,
    keys and values twice with their rotations; for every batch of the block its positions' embeddings;
    attention scores of a bounded number of queries over the longest context, or where attention of prompts is
    always ``fused`` a mask of them (places, bits, floats) and the scores of one query that decodes; logits of
    a bounded number of positions as computed, in float32 and normalised. Attention in transformers' own code
    writes out the scores of a whole prompt, of ``longest`` tokens, over copies of its keys and values, and
    keeps masks of all sequences for a pass.
    """
    compute = spec.compute_bytes
    widest = max(key + value for key, value in spec.kv_widths)
    queries_beyond_hidden = max(0, spec.query_width - spec.hidden_size)
    values = 8 * spec.hidden_size + 3 * spec.intermediate_size + 7 * widest
    values += 3 * queries_beyond_hidden
    if spec.experts_per_token:
        values += 6 * spec.intermediate_size + 4 * spec.experts_per_token * spec.hidden_size
    layer = tokens * values * compute
    positions = policy.num_device_batches * tokens * 4 * max(key for key, _ in spec.kv_widths)
    queries = min(tokens, QUERY_ROWS)
    scores = 4 * (1 if fused else queries) * context * spec.num_heads * 4 + 3 * context * widest * compute
    if fused:
        scores += 2 * queries * context * (8 + 1 + 4)
    if spec.own_attention:
        scores = (6 * longest * spec.num_heads + policy.num_device_batches * 3 * tokens) * context * 4
        scores += 8 * context * widest * compute
    logits = min(LOGITS_ROWS, tokens) * spec.vocab_size * (compute + 8)
    convert = 0
    if policy.kv_quant or _packs_weights(spec, policy):
        convert = _scratch_bytes(spec, tokens) if computes_packed else 3 * _convert_bytes(spec)
    return layer + positions + max(scores, logits) + convert


def _packs_weights(spec: ModelSpec, policy: Policy) -> bool:
    """Whether some weight is kept in few bits, by the policy or by its checkpoint."""
    return any(policy.weight_quant.of(tensor) for tensor in spec.tensors.values())


def _scratch_bytes(spec: ModelSpec, tokens: int) -> int:
    """Bytes that the compiled kernels allocate: a few hundred tokens rearranged, panels per thread."""
    widest = max(tensor.matrix[1] for tensor in spec.tensors.values() if tensor.is_matrix)
    return 4 * min(tokens, _SCRATCH_TOKENS) * widest + _SCRATCH_PANELS


def _convert_bytes(spec: ModelSpec) -> int:
    """Temporaries of packing or unpacking one chunk: six float32 tensors of its size."""
    return 24 * min(CONVERT_VALUES, max(tensor.numel for tensor in spec.tensors.values()))
