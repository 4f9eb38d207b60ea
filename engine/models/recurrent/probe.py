"""Finds the recurrent modules of a layer and what they keep, by calling copies of them without weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from engine.kernels.calls import StateKey
from engine.models.linear import PackedConv1D, PackedEmbedding, PackedLinear
from engine.models.recurrent.measure import Dependence, PeakBytes, own_tensors
from engine.models.recurrent.ways import WAYS, Session, Way, state_attributes

_TOKENS = 13
"""Of a probe: unlike the number of heads or groups of any model, so that shapes show it."""
_PLAIN = {PackedLinear: nn.Linear, PackedConv1D: Conv1D, PackedEmbedding: nn.Embedding}


@dataclass(frozen=True)
class Found:
    """How a module is given a state, and what it keeps of a sequence."""

    way: Way
    kept: Mapping[StateKey, Tensor]
    """[1, ...] each, on the meta device."""

    continues: bool
    """Whether several tokens at once can follow others; else they follow one by one, for what was kept is
    not looked at otherwise."""

    of_tokens: tuple[bool, ...]
    """Per member of what the module returns, a tuple or one tensor, whether it has a row per token."""


class Prober:
    """Probes the modules of a model, those that are alike once."""

    def __init__(self, hidden_size: int, count: int) -> None:
        """Prepare.

        Args:
            count: most states of one kind that a module has.
        """
        self._hidden_size, self._count = hidden_size, count
        self._known: dict[object, Found | None] = {}

    def innermost(self, layer: nn.Module) -> list[tuple[nn.Module, Found]]:
        """The modules of a layer that keep a state themselves, in the layer's order."""
        names = {name: module for name, module in layer.named_modules() if name}
        found: dict[str, Found] = {}
        for name in sorted(names, key=lambda name: -name.count(".")):
            if not any(other.startswith(f"{name}.") for other in found):
                kept = self._probed(names[name])
                if kept is not None:
                    found[name] = kept
        return [(module, found[name]) for name, module in names.items() if name in found]

    def _probed(self, module: nn.Module) -> Found | None:
        key = kind_of(module)
        if key not in self._known:
            self._known[key] = self._probe(module)
        return self._known[key]

    def _probe(self, module: nn.Module) -> Found | None:
        """None for a module that keeps nothing.

        One that cannot be called like this keeps what it had asked for until then; if that is not all, the
        architecture check finds its answers wrong.
        """
        parameters = inspect.signature(module.forward).parameters
        for way in WAYS:
            if not _first(parameters) or not any(name in parameters for name in way.names):
                continue
            bare = _without_weights(module)
            session = way.begin(self._count, {}, False)
            result = None
            with suppress(Exception):  # whatever a module raises that wants more than hidden states
                result = _call(bare, session, self._hidden_size, _TOKENS)
            if kept := session.kept():
                continues = all(self._continues(bare, way, kept, key) for key in kept)
                members = result if isinstance(result, tuple) else (result,)
                return Found(way, kept, continues, tuple(map(_has_tokens, members)))
        return None

    def _continues(self, bare: nn.Module, way: Way, kept: Mapping[StateKey, Tensor], key: StateKey) -> bool:
        """Whether the results for several tokens depend on a state that was there before."""
        states = {name: torch.empty_like(state) for name, state in kept.items()}
        session = way.begin(self._count, states, True)
        with suppress(Exception), Dependence(states[key]) as dependence:
            result = _call(bare, session, self._hidden_size, _TOKENS)
            return any(map(dependence.reaches, tree_leaves(result)))
        return False

    def workspace(self, module: nn.Module, found: Found, tokens: int) -> tuple[int, int]:
        """Bytes that a module takes while it computes ``tokens`` of a prompt, and one token after others."""
        bare = _without_weights(module)
        session = found.way.begin(self._count, {}, False)
        peaks = []
        for count in (tokens, 1):
            with suppress(Exception), PeakBytes(own_tensors(bare)) as counted:
                _call(bare, session, self._hidden_size, count)
            peaks.append(counted.peak)
        return peaks[0], peaks[1]


def _has_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == (1, _TOKENS)


def kind_of(module: nn.Module) -> object:
    """The same for modules that keep the same."""
    return type(module), tuple((name, tensor.shape) for name, tensor in module.named_parameters())


def _first(parameters: Mapping[str, inspect.Parameter]) -> str:
    """Name of the first parameter, which takes hidden states; empty for none."""
    return next((name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD), "")


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy on the meta device, with plain products."""
    left: dict[int, Any] = {id(getattr(part, name)): None for part, name in state_attributes(module)}
    left.pop(id(None), None)
    bare = copy.deepcopy(module, left).to("meta")  # without what an earlier call has left in attributes
    for part in bare.modules():
        part.__dict__.pop("forward", None)  # a mixer's, once it is installed
        part.__class__ = _PLAIN.get(type(part), type(part))  # type: ignore[arg-type]
    return bare


def _call(bare: nn.Module, session: Session, hidden_size: int, tokens: int) -> Any:
    """Call a module without weights with the hidden states of one sequence and their positions."""
    signature = inspect.signature(bare.forward)
    weights = [parameter for parameter in bare.parameters() if parameter.dim() > 1]
    dtype = weights[0].dtype if weights else torch.float32
    given: dict[str, Any] = {
        name: None
        for name, one in signature.parameters.items()
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    }
    if "position_ids" in signature.parameters:
        given["position_ids"] = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    given[_first(signature.parameters)] = torch.empty(1, tokens, hidden_size, dtype=dtype, device="meta")
    with torch.no_grad():
        return session.call(bare, bare.forward, signature.bind(**given))
