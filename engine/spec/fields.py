"""Reads stored JSON into frozen dataclasses by their fields' types, and names the field that is damaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

Signed = Annotated[int, "signed"]
"""A whole number that is no count and may be negative."""


class FieldError(ValueError):
    """A stored field is missing or not of its type; the text begins with its dotted name."""


def read_fields(kind: type[T], content: Any, where: str = "") -> T:
    """The dataclass ``kind`` from the JSON object that `dataclasses.asdict` made of it.

    Other keys are ignored, and a field with a default may be absent. Whole numbers are counts and not
    negative, save those that are `Signed`; other numbers are finite or NaN. Where None is allowed, NaN and an
    empty object are None. A class with a ``from_dict`` of its own reads itself.

    Raises:
        FieldError: naming the field, under ``where``.
    """
    if not isinstance(content, dict):
        raise FieldError(f"{where or 'the content'} is not an object")
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for field in fields(kind):  # type: ignore[arg-type]
        name = f"{where}.{field.name}".strip(".")
        if field.name in content:
            found[field.name] = _value(hints[field.name], content[field.name], name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise FieldError(f"{name} is missing")
    return kind(**found)


def _value(kind: Any, value: Any, where: str) -> Any:
    if signed := kind == Signed:
        kind = int
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, UnionType):
        if NoneType in inner and (value is None or value == {} or value != value):
            return None
        options = tuple(option for option in inner if option is not NoneType)
        if len(options) == 1:
            return _value(options[0], value, where)
        _check(isinstance(value, options), where, "is of another type")
        return value
    if is_dataclass(kind):
        own = getattr(kind, "from_dict", None)
        return read_fields(kind, value, where) if own is None else own(value)  # type: ignore[arg-type]
    if isinstance(kind, type) and issubclass(kind, Enum):
        _check(value in list(kind), where, f"is none of {', '.join(option.value for option in kind)}")
        return kind(value)
    if outer is Literal:
        _check(value in inner, where, f"is none of {', '.join(inner)}")
    elif outer is Mapping:
        _check(isinstance(value, dict), where, "is not an object")
        return {
            _value(inner[0], key, where): _value(inner[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    elif outer in (Sequence, tuple):
        _check(isinstance(value, (list, tuple)), where, "is not a list")
        return tuple(_value(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif kind is int:
        _check(isinstance(value, int) and not isinstance(value, bool), where, "is not a whole number")
        _check(signed or value >= 0, where, f"is negative: {value}")
    elif kind is float:
        _check(isinstance(value, (int, float)) and not isinstance(value, bool), where, "is not a number")
        _check(not math.isinf(value), where, "is not finite")
    elif kind is not Any:
        _check(isinstance(value, kind), where, {str: "is not a text"}.get(kind, f"is not a {kind.__name__}"))
    return value


def _check(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise FieldError(f"{where} {what}")
