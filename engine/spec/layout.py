"""How things are laid out where they are kept: shared by who plans the bytes and who allocates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.spec.hardware import Tier
from engine.spec.model import ModelSpec, TensorSpec
from engine.spec.policy import Policy

SLOTS = 2
"""Buffers per kind that loads alternate between: one in use, one being filled."""

LOGITS_ROWS = 64
"""Positions whose logits are held at once."""

QUERY_ROWS = 256
"""Queries whose attention scores are held at once, where they must be written out."""

CONVERT_VALUES = 1 << 18
"""Values that are packed or unpacked at once; bounds the temporaries."""


ALIGNMENT = 4096
"""Bytes: every weight on disk begins at a multiple of it, as reads past the page cache want."""


def aligned(offset: int) -> int:
    """The next offset at which a weight on disk may begin."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything will be and the most bytes it will take."""

    weights: Mapping[str, Tier]
    kv_seats: Sequence[Tier]
    activation_seats: Sequence[Tier]
    """Tier of every weight, and of every seat of the block for its KV cache and its hidden states."""

    tiers: Mapping[Tier, Mapping[str, int]]
    """Bytes per tier and purpose."""

    batch_tokens: int
    """Most packed tokens of one device batch in a pass."""

    kv_moves: bool
    """Whether some of the KV cache has to be brought to the device for attention and written back."""

    kv_rows: int
    """Most tokens, past and fresh, of a device batch that are brought to the device for one layer."""

    stage_buffer: int
    """Values of the largest stage's weights that have to be loaded: the size of a weight buffer."""

    loading: int
    """Bytes of host memory that reading a checkpoint takes at most, beside the weights already in place."""

    reserved: int
    """Bytes of the device tier for what torch allocates by itself: hidden states in flight, temporaries."""

    unified: bool
    """Whether device and host are one memory."""

    def total(self, tier: Tier) -> int:
        """Most bytes in one tier."""
        return sum(self.tiers[tier].values())


def stored_bytes(tensor: TensorSpec, tier: Tier, policy: Policy, compute_bytes: int) -> int:
    """Bytes that one weight takes in its tier.

    Compressed weights are packed wherever they are. Uncompressed ones are ready to compute with in
    the device tier and in the checkpoint's own precision elsewhere.
    """
    if policy.weight_quant and tensor.compressible:
        rows = tensor.numel // tensor.shape[-1]
        return rows * policy.weight_quant.row_bytes(tensor.shape[-1])
    return tensor.numel * compute_bytes if tier is Tier.DEVICE else tensor.nbytes


def needs_loading(tensor: TensorSpec, tier: Tier, policy: Policy) -> bool:
    """Whether a weight has to be brought into a stage buffer before it can be computed with."""
    return tier is not Tier.DEVICE or bool(policy.weight_quant and tensor.compressible)


def row_bytes(width: int, policy: Policy, compute_bytes: int) -> int:
    """Bytes of one token's keys (or values) of one layer in the KV cache."""
    return policy.kv_quant.row_bytes(width) if policy.kv_quant else width * compute_bytes


def kv_token_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Bytes of one token in the KV cache, over all layers."""
    return sum(
        row_bytes(key, policy, spec.compute_bytes) + row_bytes(value, policy, spec.compute_bytes)
        for key, value in spec.kv_widths
    )
