"""How weights and buffers are laid out, for planning their bytes and for allocating them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from engine.spec.float_format import FLOAT_KINDS, FloatSpec, MatrixForm
from engine.spec.hardware import Tier
from engine.spec.model import DTYPE_BYTES, TensorSpec
from engine.spec.policy import Policy
from engine.units import MIB

STAGE_BUFFERS = 2
"""Buffers per kind that loads alternate between: one in use, one being filled."""

FIRST_STAGE_BUFFER = STAGE_BUFFERS
LAST_STAGE_BUFFER = STAGE_BUFFERS + 1
WEIGHT_SLOTS = STAGE_BUFFERS + 2
"""Weight buffers: two that the layers and mostly the head share in turn; one of the first stage alone, which
is small: of embedding tables elsewhere only the rows that are asked for are brought; one of a head to stay.
"""

LOGITS_ROWS = 64
"""Positions whose logits are computed at once."""

FUSED_ROWS = 16
"""Most rows of activations whose product on an accelerator reads the packed matrix itself; more are worth
unpacking it once."""

QUERY_ROWS = 256
"""Queries whose attention scores exist at once, where they must be written out."""

CONVERT_VALUES = 1 << 18
"""Values that are packed or unpacked at once; bounds the temporaries."""

ALIGNMENT = 4096
"""Bytes: every weight on disk begins at a multiple of it, as reads past the page cache want."""

LARGEST_RAW = 1 * MIB
"""Bytes of a weight that is converted from a stage's own buffer; larger ones share one for all stages."""

STAGING_BUFFERS = 3
"""Pinned buffers of one kind between disk and a device that is a memory of its own."""

STAGING_BYTES = 16 * MIB
"""Size of each of those through which weights pass, at most."""

STORE_PIECE = 4 * MIB
"""Bytes of the packed store that are written, read back and checked at once, at most."""

STORE_BUFFERS = 4
"""Buffers of such pieces while an entry of the store is written."""

KV_STAGE = 8 << 20
"""Bytes of the KV cache that are staged at once between disk and a device that is a memory of its own."""

STATE_STAGE = 8 << 20
"""The same for recurrent and convolution state."""

HOST_ATTENTION_BUFFERS = 2
"""Buffers through which queries come to the host and results go back."""

IN_MEMORY = 64
"""Bytes: whatever begins within a buffer begins at a multiple of it, a cache line."""


def aligned(offset: int, to: int = ALIGNMENT) -> int:
    """The next offset at which a weight on disk, or with `IN_MEMORY` a part of a buffer, may begin."""
    return -(-offset // to) * to


def stage_buffer_bytes(stages: Sequence[Sequence[KeptWeight]]) -> list[int]:
    """Bytes of a buffer per stage, for what is brought of its weights."""
    return [
        sum(kept.raw_bytes + kept.exact_bytes for kept in weights if kept.brought(stage))
        for stage, weights in enumerate(stages)
    ]


def stays_in_place(sizes: Sequence[int], weights: Sequence[KeptWeight]) -> bool:
    """Whether the head has a buffer of its own, so that one pass brings it for all.

    Where it is as large as two layers, as a large vocabulary makes it, that takes no more memory than two
    shared buffers of its size. What lies there must serve passes of few and of many tokens.

    Args:
        sizes: bytes of every stage, see `stage_buffer_bytes`.
        weights: of the head.
    """
    serves_all = all(kept.form is None or kept.ready is not Ready.EXACT for kept in weights)
    return serves_all and sizes[-1] > 0 and sizes[-1] >= STAGE_BUFFERS * max(sizes[1:-1], default=0)


class Ready(StrEnum):
    """How a weight becomes ready to be computed with."""

    IN_PLACE = "in place"
    """Where it is kept, exact or packed."""

    AS_KEPT = "as kept"
    """Brought into a buffer and not changed: packed, or already in the precision that is computed in."""

    EXACT = "exact"
    """Brought into a buffer and unpacked or converted."""


@dataclass(frozen=True)
class KeptWeight:
    """How one weight is kept, and what has to be done before it can be computed with."""

    tensor: TensorSpec
    tier: Tier

    form: MatrixForm | None
    """What its bytes are; None for plain numbers that no kernel computes with as they are."""

    dtype: str
    """Kind of number that is kept; ``uint8`` for packed ones."""

    ready: Ready
    nbytes: int
    """Bytes in its tier."""

    raw_bytes: int
    """Bytes of a stage's buffer for what is kept, as it is brought from elsewhere."""

    exact_bytes: int
    """Bytes of a stage's buffer for the numbers that are made of it."""

    near: bool
    """Whether the device reads it where it is kept."""

    def brought(self, stage: int) -> bool:
        """Whether it is brought into the buffer of a stage that reads it."""
        return self.ready is not Ready.IN_PLACE and not (stage == 0 and self.by_rows)

    @property
    def by_rows(self) -> bool:
        """Whether the first stage brings only those of its rows that are asked for."""
        whole_rows = self.form is None or isinstance(self.form, FloatSpec)
        return self.tensor.table and whole_rows and not self.near

    @property
    def staged(self) -> bool:
        """Whether it is brought into a buffer that all stages share, and unpacked or converted from there."""
        return self.ready is Ready.EXACT and not self.raw_bytes and not self.near


def kept_weight(
    tensor: TensorSpec, tier: Tier, policy: Policy, compute_dtype: str, unified: bool, computes_packed: bool
) -> KeptWeight:
    """How one weight is kept.

    Args:
        unified: whether device and host are one memory.
        computes_packed: whether products are computed straight from packed weights, whatever their rows.
    """
    form, near = kept_form(tensor, policy, computes_packed), is_near(tier, unified)
    compute_bytes = DTYPE_BYTES[compute_dtype]
    if form is None:
        # Vectors are few bytes: where they are near they are kept as they are needed.
        as_needed = tier is Tier.DEVICE or (near and not tensor.is_matrix)
        dtype = compute_dtype if as_needed else tensor.dtype
        nbytes = tensor.numel * DTYPE_BYTES[dtype]
        converts = dtype != compute_dtype
    else:
        dtype, nbytes = "uint8", form.nbytes(*tensor.matrix)
        integer = form.activation_bits != 16  # a product of integers cannot be made of unpacked numbers
        converts = not tensor.fused or not (computes_packed or integer)
    ready = Ready.EXACT if converts else Ready.IN_PLACE if near else Ready.AS_KEPT
    raw_bytes = 0
    if not near and (ready is Ready.AS_KEPT or nbytes <= LARGEST_RAW):
        raw_bytes = aligned(nbytes + ALIGNMENT) if tier is Tier.DISK else aligned(nbytes, IN_MEMORY)
    exact_bytes = aligned(tensor.numel * compute_bytes, IN_MEMORY) if converts else 0
    return KeptWeight(tensor, tier, form, dtype, ready, nbytes, raw_bytes, exact_bytes, near)


def kept_form(tensor: TensorSpec, policy: Policy, computes_packed: bool) -> MatrixForm | None:
    """The format of a weight's bytes; None for plain numbers.

    Numbers of 16 bits are computed with as they are where the kernels can, for a CPU's own arithmetic
    in 16 bits is emulated, and float32 would take twice the bytes and the time to convert.
    """
    form = policy.weight_quant.of(tensor)
    raw = computes_packed and tensor.fused and not tensor.transposed and len(tensor.shape) == 2
    if form is None and raw and tensor.dtype in FLOAT_KINDS:
        return FloatSpec(tensor.dtype)
    return form


def is_near(tier: Tier, unified: bool) -> bool:
    """Whether the device computes with what is kept in a tier without moving it."""
    return tier is Tier.DEVICE or (unified and tier is Tier.HOST)
