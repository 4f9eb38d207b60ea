"""The cache that `transformers` gives its recurrent modules, with tensors of ours in it.

Axes: S sequences that are computed together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from engine.kernels.calls import StateKey

CONV, RECURRENT = "conv", "recurrent"
"""Kinds of state."""


class NotRecurrent(Exception):
    """A module asks the cache for keys and values, not for a state."""


class _Layer(LinearAttentionLayer):
    """One layer's states; those that were given are updated in place."""

    def __init__(self, count: int, given: Mapping[StateKey, Tensor], has_past: bool) -> None:
        super().__init__(number_of_states=count)
        for (kind, index), tensor in given.items():
            if kind == CONV:
                self.conv_states[index], self.is_conv_states_initialized[index] = tensor, True
                self.conv_kernel_size[index] = tensor.shape[-1]
            else:
                self.recurrent_states[index], self.is_recurrent_states_initialized[index] = tensor, True
            self.has_previous_state[index] = has_past

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        """States of its own, as `transformers` makes them; they are not marked for its compiler."""
        if conv_states is not None:
            size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            self.conv_kernel_size[state_idx] = size
            self.conv_states[state_idx] = conv_states.new_zeros((*conv_states.shape[:-1], size))
            self.is_conv_states_initialized[state_idx] = True
        if recurrent_states is not None:
            self.recurrent_states[state_idx] = torch.zeros_like(recurrent_states)
            self.is_recurrent_states_initialized[state_idx] = True


class _ForEveryLayer(list[_Layer]):
    """The same layer at every index: a module names the layer that it is in."""

    def __init__(self, layer: _Layer) -> None:
        super().__init__([layer])
        self._layer = layer

    def __getitem__(self, index: Any) -> Any:
        return self._layer

    def __len__(self) -> int:
        return 1 << 20


class StateCache(Cache):
    """The states of sequences that one module computes together."""

    def __init__(self, count: int, given: Mapping[StateKey, Tensor], has_past: bool) -> None:
        """Take the tensors to read and update.

        Args:
            count: of the module's states of one kind.
            given: [S, ...] each; what is missing is held by this object alone.
            has_past: whether they are those of earlier tokens; else they only receive.
        """
        self._layer = _Layer(count, given, has_past)
        super().__init__(layers=[self._layer])
        self.layers: Any = _ForEveryLayer(self._layer)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse keys and values: they are kept elsewhere.

        Raises:
            NotRecurrent: always.
        """
        raise NotRecurrent

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """The first recurrent state [S, ...], as lightning attention (MiniMax) asks for it."""
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Keep the first recurrent state [S, ...], as lightning attention (MiniMax) hands it over."""
        self.update_recurrent_state(linear_cache, layer_idx)
        self._layer.has_previous_state[0] = True

    def kept(self) -> dict[StateKey, Tensor]:
        """All states that the module has asked to keep, [S, ...] each."""
        kinds = ((CONV, self._layer.conv_states), (RECURRENT, self._layer.recurrent_states))
        return {
            (kind, index): tensor
            for kind, states in kinds
            for index, tensor in states.items()
            if tensor is not None
        }
