"""What a model's text decoder really does, found by running it without weights.

The base model runs on zeros that take no memory, with its layers left out: which modules it applies after
them, and how it calls them. Each layer then runs on shapes alone up to its attention, which tells the widths
of its queries, keys and values. Nothing of this is read from a config's names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from engine.kernels.backend import kernels_for
from engine.kernels.calls import AttentionCall, HeadShape
from engine.models.attention import AttentionBatch, attending
from engine.models.decoder.parts import Parts
from engine.models.decoder.stand_ins import Recorder, logits_of, record_layers
from engine.models.decoder.ways import Way, attention_modules, record_sequences, run_apart
from engine.spec.kv_format import KVFormat

_OUTPUTS = (0, 2, 3)
"""What layers return, in the order of trying: hidden states alone, or a tuple of so many."""


@dataclass(frozen=True)
class Measured:
    """A text decoder as it runs."""

    tail: tuple[str, ...]
    """Names of the modules that the base model applies after its layers, in order."""

    called: frozenset[str]
    """Names of the modules, layers apart, that run for text."""

    outputs: int
    """Members of the tuple that a layer returns; 0 for hidden states alone."""

    hidden: int
    """Width of the hidden states."""

    visited: tuple[bool, ...]
    """Per layer whether text passes through it."""

    shapes: tuple[HeadShape | None, ...]
    """Per layer the heads and widths of its attention; None for a layer without."""


class _Reached(Exception):
    """A layer has come to its attention."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape


class _Meter:
    """Key-values that attention never gets past."""

    form: KVFormat | None = None

    def __init__(self) -> None:
        self.kernels = kernels_for(torch.device("cpu"))

    def decode(self, call: AttentionCall) -> NoReturn:
        raise _Reached(call.shape)

    def extend(self, index: int, key: Tensor, value: Tensor) -> NoReturn:
        groups = key.shape[1]
        raise _Reached(HeadShape(groups, groups, key.shape[2], value.shape[2]))

    def commit(self) -> None:
        pass


def measure(model: nn.Module, parts: Parts, way: Way) -> Measured:
    """Measure a model, which may be on the meta device.

    Raises:
        UnsupportedModelError: if its layers cannot be reached one by one.
    """
    logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)  # handled here
    names = {id(module): name for name, module in model.named_modules()}
    layers = {module for layer in parts.layers for module in layer.modules()}
    others = [module for module in model.modules() if module not in layers]
    seen = _Seen(names)
    with torch.no_grad():
        with _filled(others, _nothing), _watching(seen):
            outputs, hidden, calls = _record(parts, way, seen)
        in_head = _Seen(names)
        with FakeTensorMode(allow_non_fake_inputs=True), _filled(others, _shape_only), _watching(in_head):
            tail = [model.get_submodule(name) for name in seen.tail]
            logits_of(parts, tail, torch.empty(hidden.shape, dtype=hidden.dtype))
        shapes = [
            _attention_of(layer, call, hidden, way) for layer, call in zip(parts.layers, calls, strict=True)
        ]
    called = frozenset({*seen.names, *in_head.names})
    visited = tuple(call is not None for call in calls)
    return Measured(tuple(seen.tail), called, outputs, hidden.shape[-1], visited, tuple(shapes))


def _record(parts: Parts, way: Way, seen: _Seen) -> tuple[int, Tensor, list[Any]]:
    """How the base model calls its layers for one token: members of their tuples, hidden states, calls."""
    token = torch.zeros(1, 1, dtype=torch.long)
    failure: Exception | None = None
    for outputs in _OUTPUTS:
        seen.begin()
        try:
            if way is Way.PACKED:
                inputs = {"input_ids": token, "position_ids": token, "use_cache": False}
                return outputs, *record_layers(parts, inputs, outputs)
            return outputs, *record_sequences(parts, outputs, token, token, [1], ())
        except Exception as error:  # whatever a base model raises when its layers return something else
            failure = failure or error
    assert failure is not None
    raise failure


def _attention_of(layer: nn.Module, call: Any, hidden: Tensor, way: Way) -> HeadShape | None:
    """Heads and widths of a layer's attention, from its shapes alone; None where it has none."""
    if call is None:
        return None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _filled(layer.modules(), _shape_only):
            _run_layer(layer, call, torch.empty(hidden.shape, dtype=hidden.dtype), way)
    except _Reached as reached:
        return reached.shape
    except (DynamicOutputShapeException, DataDependentOutputException):  # experts are chosen by values
        try:
            if attention_modules(layer):  # which may come before attention, too (JetMoE)
                with _filled(layer.modules(), _nothing):
                    _run_layer(layer, call, hidden, way)
        except _Reached as reached:
            return reached.shape
        except Exception:  # as below
            return None
    except Exception:  # behind attention, or instead of it; the check runs every kind of layer as it is
        pass
    return None


def _run_layer(layer: nn.Module, call: Any, hidden: Tensor, way: Way) -> None:
    batch = AttentionBatch([hidden.shape[1]], _Meter(), begins=[0])
    if way is Way.PACKED:
        with attending(batch):
            layer(hidden, *call.args, **call.kwargs)
    else:
        run_apart(layer, hidden, call, batch, way)


class _Seen:
    """Which modules run, and which of them after the last layer."""

    def __init__(self, names: dict[int, str]) -> None:
        """Args: the modules' names by their identity."""
        self._all = names
        self.begin()

    def begin(self) -> None:
        """Forget what was seen."""
        self.names: set[str] = set()
        self.tail: list[str] = []
        self._depth, self._after_layer = 0, False

    def enter(self, module: nn.Module, *_: Any) -> None:
        """A module begins to run."""
        name = self._all.get(id(module))
        if name is None:
            return
        self.names.add(name)
        if self._after_layer:
            if not self._depth:
                self.tail.append(name)
            self._depth += 1

    def leave(self, module: nn.Module, *_: Any) -> None:
        """A module has run."""
        if isinstance(module, Recorder):
            self.tail, self._depth = [], 0
            self._after_layer = True
        elif self._after_layer and self._depth and id(module) in self._all:
            self._depth -= 1


@contextmanager
def _watching(seen: _Seen) -> Iterator[None]:
    """Note every module that runs meanwhile."""
    hooks = [register_module_forward_pre_hook(seen.enter), register_module_forward_hook(seen.leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _filled(modules: Iterable[nn.Module], make: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put something in the place of all of the modules' own tensors that are on the meta device."""
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in modules:
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        before += (
            (table, name, value)
            for table in tables
            for name, value in table.items()
            if value is not None and value.is_meta
        )
    try:
        for table, name, value in before:
            table[name] = make(value)
        yield
    finally:
        for table, name, value in before:
            table[name] = value


def _nothing(tensor: Tensor) -> Tensor:
    """Zeros of the same shape that share one place in memory."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _shape_only(tensor: Tensor) -> Tensor:
    """A tensor of the same shape on the CPU; without memory in a `FakeTensorMode`."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)
