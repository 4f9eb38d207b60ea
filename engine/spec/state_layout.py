"""How recurrent and convolution state is kept and laid out, in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate

from engine.spec.layout import IN_MEMORY, aligned
from engine.spec.model import DTYPE_BYTES, ModelSpec, StateTensor
from engine.spec.policy import Policy
from engine.spec.state_format import StateFormat

SHORTEST_ROW = 16
"""Values of a row that is kept in 8 bits; shorter ones, as convolutions have, are kept in bfloat16."""

SCALE_BYTES = 4
"""Of a row's scale, a float32."""


class Kept(StrEnum):
    """How the values of one tensor are kept."""

    EXACT = "exact"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


@dataclass(frozen=True)
class StateLayer:
    """The bytes of one sequence's state at one layer, its *record*: one tensor after the other."""

    tensors: tuple[StateTensor, ...]
    form: StateFormat

    def kept(self, tensor: StateTensor) -> Kept:
        """How a tensor is kept."""
        if self.form is StateFormat.FLOAT32:
            return Kept.EXACT
        if self.form is StateFormat.INT8 and tensor.shape[-1] >= SHORTEST_ROW:
            return Kept.INT8
        return Kept.BFLOAT16 if DTYPE_BYTES[tensor.dtype] > 2 else Kept.EXACT

    def nbytes_of(self, tensor: StateTensor) -> int:
        """Bytes of a tensor as it is kept."""
        match self.kept(tensor):
            case Kept.EXACT:
                return tensor.nbytes
            case Kept.BFLOAT16:
                return 2 * tensor.numel
        return tensor.numel + tensor.numel // tensor.shape[-1] * SCALE_BYTES

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Offset of every tensor in a record, and its end."""
        return (0, *accumulate(aligned(self.nbytes_of(tensor), IN_MEMORY) for tensor in self.tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return self.begins[-1]

    @property
    def stride(self) -> int:
        """Bytes from one record to the next on disk, and where records are brought to."""
        return aligned(self.nbytes)

    @cached_property
    def is_exact(self) -> bool:
        """Whether all of it is kept as it is computed, so that it is computed with where it lies."""
        return all(self.kept(tensor) is Kept.EXACT for tensor in self.tensors)


def state_layers(spec: ModelSpec, policy: Policy, exact: bool = False) -> tuple[StateLayer, ...]:
    """Per layer how its state is kept; with ``exact`` as it is computed. Empty where no layer keeps any."""
    form = StateFormat.FLOAT32 if exact else policy.state_quant
    return tuple(StateLayer(tensors, form) for tensors in spec.states) if spec.has_state else ()
