"""The ways in which recurrent modules of `transformers` are given a state and hand it back.

Most ask a cache for it; some hold it in attributes of their own between calls. A *session* is the calls of a
module for one group of sequences.

Axes: S sequences that are computed together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from engine.kernels.calls import StateKey
from engine.models.recurrent.cache import RECURRENT, StateCache

Forward = Callable[..., Any]


class Session(Protocol):
    """The calls of a module for one group of sequences, whose tokens come in order."""

    def call(self, module: nn.Module, forward: Forward, given: inspect.BoundArguments) -> Any:
        """Call a module's own ``forward``, the state being that of the tokens before."""
        ...

    def kept(self) -> Mapping[StateKey, Tensor]:
        """All states after the last call, [S, ...] each."""
        ...


_CACHES = ("cache_params", "past_key_values")


class _CacheSession:
    """A cache object among the arguments."""

    def __init__(self, count: int, given: Mapping[StateKey, Tensor], has_past: bool) -> None:
        self._cache = StateCache(count, given, has_past)

    def call(self, module: nn.Module, forward: Forward, given: inspect.BoundArguments) -> Any:
        name = next(name for name in _CACHES if name in given.signature.parameters)
        given.arguments[name] = self._cache
        return forward(*given.args, **given.kwargs)

    def kept(self) -> Mapping[StateKey, Tensor]:
        return self._cache.kept()


class _AttributeSession:
    """Attributes of the module or of its parts, that are None before its first token.

    The module replaces them at every call, and they are copied to where they are kept.
    """

    def __init__(self, count: int, given: Mapping[StateKey, Tensor], has_past: bool) -> None:
        self._given = given
        self._now: dict[StateKey, Tensor] = dict(given) if has_past else {}

    def call(self, module: nn.Module, forward: Forward, given: inspect.BoundArguments) -> Any:
        given.arguments["use_cache"] = True
        places = list(state_attributes(module))
        for index, (part, name) in enumerate(places):
            setattr(part, name, self._now.get((RECURRENT, index)))
        try:
            result = forward(*given.args, **given.kwargs)
            found = [getattr(part, name) for part, name in places]
        finally:
            for part, name in places:
                setattr(part, name, None)
        self._take({(RECURRENT, i): new for i, new in enumerate(found) if isinstance(new, Tensor)})
        return result

    def kept(self) -> Mapping[StateKey, Tensor]:
        return self._now

    def _take(self, new: Mapping[StateKey, Tensor]) -> None:
        for key, tensor in new.items():
            if key in self._given:
                self._given[key].copy_(tensor)
                self._now[key] = self._given[key]
            else:
                self._now[key] = tensor


def state_attributes(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Attributes for states, whatever an earlier call has left in them."""
    for part in module.modules():
        for name, value in sorted(vars(part).items()):
            if name.endswith(("_state", "_states")) and (value is None or isinstance(value, Tensor)):
                yield part, name


class Way(NamedTuple):
    """How a module is given a state."""

    names: tuple[str, ...]
    """A forward with a parameter of one of these names may take it so."""

    begin: Callable[[int, Mapping[StateKey, Tensor], bool], Session]
    """Begins a session: with how many states of one kind the module has, the states [S, ...] to be updated
    (none where nothing outlives the session), and whether they are those of earlier tokens."""


WAYS = (
    Way(_CACHES, _CacheSession),
    Way(("use_cache",), _AttributeSession),
)
"""In the order in which they are tried."""
