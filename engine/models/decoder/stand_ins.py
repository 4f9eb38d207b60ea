"""What stands in the place of a module for a while: recorders of layers, a base model that is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from engine.errors import UnsupportedModelError
from engine.models.decoder.parts import Parts


@dataclass
class LayerCall:
    """The arguments, besides the hidden states, that the base model hands to one layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorded(Exception):
    """Leaves the base model's forward once the last layer has been recorded."""


class StandIn(nn.Module):
    """In the place of a module, with its attributes: base models read such things as layer.attention_type."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, so that it is not registered as a submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_module"][0], name)


class Recorder(StandIn):
    """Stands in for a decoder layer: notes how it is called and returns the hidden states."""

    def __init__(self, layer: nn.Module, stop: bool, outputs: int) -> None:
        super().__init__(layer)
        self._stop, self._outputs = stop, outputs
        self.hidden: Tensor | None = None
        self.call: LayerCall | None = None
        self.visits = 0

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # [1, P, hidden] as it is
        self.hidden, self.call = hidden_states, LayerCall(args, kwargs)
        self.visits += 1
        if self._stop:
            raise _Recorded
        return (hidden_states, *[None] * (self._outputs - 1)) if self._outputs else hidden_states


class _FinalHidden(BaseModelOutputWithPast):
    """A base model's output that has the last hidden states and nothing else."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None  # router logits, cross attentions: whatever else a causal LM passes on


class _Injector(StandIn):
    """Stands in for the base model, so that the causal LM's own forward turns hidden states into logits."""

    def __init__(self, base: nn.Module, hidden: Tensor) -> None:
        super().__init__(base)
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return self if isinstance(found, PreTrainedModel) else found  # OPT calls model.decoder itself

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _FinalHidden(last_hidden_state=self._hidden)  # type: ignore[arg-type]


def record_layers(
    parts: Parts, inputs: dict[str, Any], outputs: int = 0, last: int | None = None
) -> tuple[Tensor, list[LayerCall | None]]:
    """Run the base model without its layers.

    Args:
        inputs: arguments of its forward.
        outputs: members of the tuple that a layer returns; 0 where it returns hidden states alone.
        last: leave it where this layer would begin, the last one that is called; None to go on to the end.

    Returns:
        Hidden states [1, P, hidden] before the first layer and, for every layer, how it wants to be called;
        None for one that text does not pass through.

    Raises:
        UnsupportedModelError: if a layer is called more than once, or all are not.
    """
    layers = parts.layers
    recorders = [Recorder(layer, index == last, outputs) for index, layer in enumerate(layers)]
    setattr(parts.owner, parts.list_name, nn.ModuleList(recorders))
    try:
        parts.base(**inputs)
    except _Recorded:
        pass
    finally:
        setattr(parts.owner, parts.list_name, layers)
    name, called = type(parts.causal).__name__, [recorder for recorder in recorders if recorder.visits]
    if not called or max(recorder.visits for recorder in called) > 1:
        raise UnsupportedModelError(
            f"{name} is refused: of its {len(layers)} layers {len(called)} are called, "
            f"one of them {max(recorder.visits for recorder in recorders)} times"
        )
    hidden, ends = called[0].hidden, called[-1].hidden
    assert hidden is not None and ends is not None
    if hidden.dim() != 3 or ends.shape != hidden.shape:
        raise UnsupportedModelError(
            f"{name} is refused: hidden states of shape {list(hidden.shape)} go into its first layer and "
            f"{list(ends.shape)} into the last one, where [1, tokens, width] is expected"
        )
    return hidden, [recorder.call for recorder in recorders]


def hidden_of(out: Any) -> Any:
    """The first of what a module returns: [1, P, ...]."""
    return out[0] if isinstance(out, (tuple, list)) else out


def logits_of(parts: Parts, tail: Sequence[nn.Module], hidden: Tensor) -> Tensor:
    """Hidden states [1, R, hidden] after the last layer -> logits [1, R, vocabulary].

    Args:
        tail: modules that the base model applies after its layers.
    """
    for module in tail:
        hidden = module(hidden)
    setattr(parts.causal, parts.base_name, _Injector(parts.base, hidden))
    try:
        ids = hidden.new_zeros(hidden.shape[:2], dtype=torch.long)
        logits: Tensor = parts.causal(input_ids=ids, use_cache=False).logits
    finally:
        setattr(parts.causal, parts.base_name, parts.base)
    return logits
