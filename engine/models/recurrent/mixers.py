"""Runs the recurrent modules of a layer sequence by sequence, the rest of the layer over packed tokens.

A *mixer* is the innermost module of a layer that keeps a convolution or recurrent state: a Mamba block, a
gated delta net, a short convolution. Sequences that decode are computed together, [S, 1, hidden]; prompts
one by one and in chunks, the state carried over.

Where states are kept is behind `LayerStates`; this module does not know tiers.

Axes: S sequences computed together, T tokens of each, P packed tokens of the device batch.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from engine.kernels.calls import StateGroup
from engine.models.recurrent.probe import Found, Prober, kind_of
from engine.spec.model import StateTensor

PROMPT_CHUNK = 512
"""Tokens of a prompt that a mixer computes at once; bounds its temporaries."""


class LayerStates(Protocol):
    """The states of one device batch at one layer."""

    def groups(self, module: int) -> Iterator[StateGroup]:
        """What the layer's mixer ``module`` computes, one group after the other.

        The states of a group are taken over when the next one is asked for.
        """
        ...


_current: ContextVar[LayerStates | None] = ContextVar("layer_states", default=None)


@contextmanager
def with_states(states: LayerStates | None) -> Iterator[None]:
    """Make ``states`` those that mixers read and update while a layer runs; None for a layer without any."""
    token = _current.set(states)
    try:
        yield
    finally:
        _current.reset(token)


class Mixer:
    """The forward of a recurrent module, of packed tokens.

    Attributes:
        chunk: tokens of a prompt that are computed at once.
        states: what is kept of a sequence.
    """

    def __init__(self, module: nn.Module, index: int, count: int, found: Found) -> None:
        """Take a module's place.

        Args:
            index: among the mixers of its layer.
            count: of its states of one kind.
        """
        self.module, self.found, self.chunk = module, found, PROMPT_CHUNK
        self._forward, self._index, self._count = module.forward, index, count
        self._signature = inspect.signature(module.forward)
        self._hidden = next(iter(self._signature.parameters))
        self.states = tuple(
            StateTensor(index, kind, which, tuple(t.shape[1:]), str(t.dtype).removeprefix("torch."))
            for (kind, which), t in found.kept.items()
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward, with hidden states [1, P, hidden] of all sequences."""
        states = _current.get()
        if states is None:
            return self._forward(*args, **kwargs)
        given = self._signature.bind(*args, **kwargs)
        tokens = given.arguments[self._hidden].shape[1]
        out = _Result(tokens, self.found.of_tokens)
        for group in states.groups(self._index):
            session = self.found.way.begin(self._count, group.tensors, group.has_past)
            for part in self._parts(group):
                chosen = copy.copy(given)
                chosen.arguments = {
                    name: part.select(value, tokens) for name, value in given.arguments.items()
                }
                out.add(session.call(self.module, self._forward, chosen), part)
        return out.whole

    def _parts(self, group: StateGroup) -> Iterator[_Part]:
        """Sequences that decode at once, a prompt in chunks or, where it has to follow so, token by token."""
        continues = self.found.continues
        if group.tokens == 1 or not (continues or group.has_past):
            yield _Part(group.places, group.sequences, group.tokens)
            return
        assert isinstance(group.places, slice)
        size, first = self.chunk if continues else 1, group.places.start
        for begin in range(0, group.tokens, size):
            count = min(size, group.tokens - begin)
            yield _Part(slice(first + begin, first + begin + count), 1, count)


def install_mixers(
    layers: Iterable[nn.Module], hidden_size: int, count: int
) -> tuple[tuple[StateTensor, ...], ...]:
    """Let recurrent modules of these layers take packed tokens; returns what each layer keeps of a sequence.

    Args:
        count: most states of one kind that a module has.
    """
    prober, found = Prober(hidden_size, count), []
    for layer in layers:
        for module in layer.modules():
            if isinstance(module.forward, Mixer):  # of an earlier `LayeredModel` of the same modules
                del module.__dict__["forward"]
        mixers: list[Mixer] = []
        for module, how in prober.innermost(layer):
            mixers.append(Mixer(module, len(mixers), count, how))
            module.forward = mixers[-1]  # type: ignore[assignment]
        found.append(tuple(state for mixer in mixers for state in mixer.states))
    return tuple(found)


def mixers_of(layers: Iterable[nn.Module]) -> Iterator[Mixer]:
    """All mixers that `install_mixers` made."""
    for layer in layers:
        for module in layer.modules():
            if isinstance(module.forward, Mixer):
                yield module.forward


def mixer_workspace(layers: Iterable[nn.Module], hidden_size: int, count: int) -> tuple[int, int]:
    """Most bytes that a mixer takes while it computes: a chunk of a prompt, each sequence that decodes."""
    prober = Prober(hidden_size, count)
    chunk = each = 0
    for mixer in {kind_of(mixer.module): mixer for mixer in mixers_of(layers)}.values():
        found = prober.workspace(mixer.module, mixer.found, mixer.chunk)
        chunk, each = max(chunk, found[0]), max(each, found[1])
    return chunk, each


@dataclass(frozen=True)
class _Part:
    """Consecutive tokens of every sequence of a group."""

    places: slice | Tensor
    sequences: int
    tokens: int

    def is_whole(self, tokens: int) -> bool:
        """Whether it is all ``tokens`` packed ones, in their order."""
        return isinstance(self.places, slice) and self.places == slice(0, tokens)

    def select(self, value: Any, tokens: int) -> Any:
        """What of an argument belongs to it: of tensors [1, P, ...] its tokens, [S, T, ...]."""
        if isinstance(value, Tensor):
            if value.dim() < 2 or value.shape[:2] != (1, tokens):
                return value
            return value[0, self.places].unflatten(0, (self.sequences, self.tokens))
        if isinstance(value, tuple | list):
            return type(value)(self.select(item, tokens) for item in value)
        if isinstance(value, dict):
            return {key: self.select(item, tokens) for key, item in value.items()}
        return value


class _Result:
    """What a mixer returns, put together again: [1, P, ...] of tensors [S, T, ...]."""

    def __init__(self, tokens: int, of_tokens: Sequence[bool]) -> None:
        """Prepare.

        Args:
            of_tokens: see `Found`.
        """
        self._tokens, self._of_tokens = tokens, of_tokens
        self.whole: Any = None

    def add(self, result: Any, part: _Part) -> None:
        """Take what was computed of some tokens."""
        if not isinstance(result, tuple):
            self.whole = self._put(self.whole, result, part)
            return
        before = self.whole or (None,) * len(result)
        self.whole = tuple(
            self._put(old, new, part) if has_tokens else new
            for old, new, has_tokens in zip(before, result, self._of_tokens, strict=True)
        )

    def _put(self, whole: Tensor | None, result: Tensor, part: _Part) -> Tensor:
        rows = result.flatten(0, 1)
        if part.is_whole(self._tokens):
            return rows.unsqueeze(0)
        if whole is None:  # what nothing computes is padding
            whole = rows.new_zeros(1, self._tokens, *rows.shape[1:])
        whole[0, part.places] = rows
        return whole
