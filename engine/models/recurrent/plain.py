"""The plainest store of states, for the architecture check: a tensor per state, a row per sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.kernels.calls import StateGroup, StateKey
from engine.spec.model import StateTensor


class PlainStates:
    """The `LayerStates` of sequences that all begin in the first pass and decode in the others.

    Attributes:
        layer: which layer is computed.
        lengths: tokens of each sequence in this pass.
        has_past: whether earlier passes have left a state.
    """

    def __init__(self, states: Sequence[Sequence[StateTensor]], sequences: int) -> None:
        self.layer = 0
        self.lengths: Sequence[int] = ()
        self.has_past = False
        self._kept: list[list[tuple[int, StateKey, Tensor]]] = [
            [
                (
                    state.module,
                    (state.kind, state.index),
                    torch.zeros(sequences, *state.shape, dtype=getattr(torch, state.dtype)),
                )
                for state in of_layer
            ]
            for of_layer in states
        ]

    def groups(self, module: int) -> Iterator[StateGroup]:
        """What the layer's recurrent module ``module`` computes."""
        kept = {key: tensor for owner, key, tensor in self._kept[self.layer] if owner == module}
        count = len(self.lengths)
        if self.has_past and max(self.lengths) == 1:
            yield StateGroup(slice(0, count), count, 1, kept, has_past=True)
            return
        start = 0
        for index, length in enumerate(self.lengths):
            own = {key: tensor[index : index + 1] for key, tensor in kept.items()}
            yield StateGroup(slice(start, start + length), 1, length, own, self.has_past)
            start += length
