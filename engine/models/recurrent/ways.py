"""The ways in which recurrent modules of `transformers` are given a state and hand it back.

Most ask a cache for it; some take a tuple of tensors and return the new ones; some hold it in attributes of
their own between calls. A *session* is the calls of a module for one group of sequences.

Axes: S sequences that are computed together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

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


class Way(Protocol):
    """How a module is given a state."""

    @classmethod
    def suits(cls, names: Mapping[str, Any]) -> bool:
        """Whether a forward with these parameters may take it so."""
        ...

    def begin(self, count: int, given: Mapping[StateKey, Tensor], has_past: bool) -> Session:
        """Begin a session.

        Args:
            count: of the module's states of one kind.
            given: [S, ...] each, to be updated; empty where nothing outlives the session.
            has_past: whether they are those of earlier tokens.
        """
        ...


class ByCache:
    """A cache object among the arguments."""

    names = ("cache_params", "past_key_values")

    @classmethod
    def suits(cls, names: Mapping[str, Any]) -> bool:
        return any(name in names for name in cls.names)

    def begin(self, count: int, given: Mapping[StateKey, Tensor], has_past: bool) -> Session:
        """Begin a session with states [S, ...]; see `Way.begin`."""
        return _CacheSession(StateCache(count, given, has_past))


class _CacheSession:
    def __init__(self, cache: StateCache) -> None:
        self._cache = cache

    def call(self, module: nn.Module, forward: Forward, given: inspect.BoundArguments) -> Any:
        name = next(name for name in ByCache.names if name in given.signature.parameters)
        given.arguments[name] = self._cache
        return forward(*given.args, **given.kwargs)

    def kept(self) -> Mapping[StateKey, Tensor]:
        return self._cache.kept()


class ByArgument:
    """A tuple of tensors as the argument ``state``, and the new ones beside the result."""

    @classmethod
    def suits(cls, names: Mapping[str, Any]) -> bool:
        return "state" in names

    def begin(self, count: int, given: Mapping[StateKey, Tensor], has_past: bool) -> Session:
        """Begin a session with states [S, ...]; see `Way.begin`."""
        return _ArgumentSession(given, has_past)


class _Held:
    """States that a module replaces at every call, copied to where they are kept."""

    def __init__(self, given: Mapping[StateKey, Tensor], has_past: bool) -> None:
        self._given = given
        self._now: dict[StateKey, Tensor] = dict(given) if has_past else {}

    def take(self, new: Mapping[StateKey, Tensor]) -> None:
        for key, tensor in new.items():
            if key in self._given:
                self._given[key].copy_(tensor)
                self._now[key] = self._given[key]
            else:
                self._now[key] = tensor

    def kept(self) -> Mapping[StateKey, Tensor]:
        return self._now


class _ArgumentSession(_Held):
    def call(self, module: nn.Module, forward: Forward, given: inspect.BoundArguments) -> Any:
        given.arguments["state"] = tuple(self._now.values()) or None
        result = forward(*given.args, **given.kwargs)
        if isinstance(result, tuple) and len(result) > 1 and isinstance(result[1], tuple | list):
            self.take({(RECURRENT, index): tensor for index, tensor in enumerate(result[1])})
        return result


class ByAttribute:
    """Attributes of the module or of its parts, that are None before its first token."""

    @classmethod
    def suits(cls, names: Mapping[str, Any]) -> bool:
        return "use_cache" in names

    def begin(self, count: int, given: Mapping[StateKey, Tensor], has_past: bool) -> Session:
        """Begin a session with states [S, ...]; see `Way.begin`."""
        return _AttributeSession(given, has_past)


class _AttributeSession(_Held):
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
        self.take({(RECURRENT, i): new for i, new in enumerate(found) if isinstance(new, Tensor)})
        return result


def state_attributes(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Attributes for states, whatever an earlier call has left in them."""
    for part in module.modules():
        for name, value in sorted(vars(part).items()):
            if name.endswith(("_state", "_states")) and (value is None or isinstance(value, Tensor)):
                yield part, name


WAYS: tuple[type[Way], ...] = (ByCache, ByArgument, ByAttribute)
"""In the order in which they are tried."""
