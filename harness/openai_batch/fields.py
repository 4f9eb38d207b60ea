"""The fields of a request's body, taken one by one, so that none is overlooked.

It knows types, ranges and which fields of OpenAI's format may be there without being obeyed.
"""

from __future__ import annotations

from typing import Any, TypeVar

from engine.errors import did_you_mean

Default = TypeVar("Default", bound=int | None)

_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier"}
"""Fields that say who asks; no answer depends on them."""

_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
"""Fields that are not available, with the values that ask for nothing."""


class LineError(Exception):
    """A line that cannot be answered.

    Attributes:
        status: what a server would answer, 4xx.
        code: a word for programs.
        param: the field that is wrong, if it is one.
        custom_id: of the line, if it has one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str = "invalid_request",
        param: str | None = None,
        custom_id: str | None = None,
    ) -> None:
        super().__init__(" ".join(message.split()))
        self.status, self.code, self.param, self.custom_id = status, code, param, custom_id


def utf8(value: str, where: str) -> bytes:
    """A text's bytes; raises LineError where it has none."""
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise LineError(f"{where} holds half of a surrogate pair, which is not text", param=where) from None


class Fields:
    """A body's fields; null is the same as absent."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: set[str] = set()

    def take(self, name: str) -> Any:
        """A field as it is; None if it is absent."""
        self._known.add(name)
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, value, "must be a text")
        return value

    def texts(self, name: str) -> list[str]:
        """One text or several."""
        value = self.take(name)
        listed = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
            raise self._wrong(name, value, "must be a text or texts")
        utf8("".join(listed), name)
        return listed

    def flag(self, name: str) -> bool:
        """True or false; absent is false."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "must be true or false")
        return bool(value)

    def integer(
        self, name: str, default: Default, *, low: int | None = None, high: int | None = None
    ) -> int | Default:
        """A whole number in a range."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(name, value, "must be a whole number")
        return int(self._in_range(name, value, low, high))

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """A number in a range."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(name, value, "must be a number")
        return float(self._in_range(name, value, low, high))

    def finish(self) -> None:
        """Raise LineError for the first field that was not taken and would have to be ignored."""
        for name, value in self._left.items():
            if name in _WITHOUT_EFFECT or (name in _DEFAULTS and value in _DEFAULTS[name]):
                continue
            if name in _DEFAULTS:
                raise self._wrong(name, value, "is not available: leave it out")
            raise LineError(
                f"field {name!r} of the body is not supported{did_you_mean(name, self._known)}: leave it out",
                param=name, code="unsupported_field",
            )  # fmt: skip

    def _in_range(self, name: str, value: float, low: float | None, high: float | None) -> float:
        if (low is None or value >= low) and (high is None or value <= high):  # NaN is in no range
            return value
        raise self._wrong(name, value, f"must be {f'at least {low}' if high is None else f'{low} to {high}'}")

    def _wrong(self, name: str, value: Any, why: str) -> LineError:
        shown = repr(value)
        return LineError(f"{name}={shown if len(shown) <= 60 else shown[:60] + '...'} {why}", param=name)
