"""Reads a stored JSON file whose fields are asked for by name and type, and says what is damaged.

It knows files and fields; it does not know what they mean.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import UsageError
from engine.spec.fields import FieldError, read_fields
from harness.files import require_json

SCHEMA = 1

T = TypeVar("T")


class Document:
    """A JSON file, or a part of one.

    Every reader of a field raises UsageError, naming file and field, where it is missing or of another
    type than asked for.
    """

    def __init__(self, path: Path, content: Any, where: str = "") -> None:
        self.path, self.content, self.where = path, content, where

    @classmethod
    def read(cls, path: Path) -> Document:
        """Open a file; raises UsageError where it is missing or not JSON."""
        return cls(path, require_json(path))

    def damage(self, key: str, what: str) -> UsageError:
        """The error that says what is wrong with a field."""
        name = f"{self.where}.{key}".strip(".")
        return UsageError(f"{self.path} is damaged ({name} {what}): run the suite again")

    def _value(self, key: str, kinds: type | tuple[type, ...], wanted: str) -> Any:
        if not isinstance(self.content, dict) or key not in self.content:
            raise self.damage(key, "is missing")
        value = self.content[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self.damage(key, f"is not {wanted}")
        return value

    def as_a(self, kind: type[T]) -> T:
        """The dataclass that was stored, see `engine.spec.fields.read_fields`."""
        try:
            return read_fields(kind, self.content, self.where)
        except FieldError as error:
            raise UsageError(f"{self.path} is damaged ({error}): run the suite again") from None

    def parts(self, key: str) -> list[Document]:
        """The items of the list under a key."""
        items = self._value(key, list, "a list")
        return [
            Document(self.path, item, f"{self.where}.{key}[{i}]".strip(".")) for i, item in enumerate(items)
        ]

    def text(self, key: str) -> str:
        """A text."""
        return str(self._value(key, str, "a text"))

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._value(key, (int, float), "a number")
        if abs(value) > sys.float_info.max or value != value:
            raise self.damage(key, "is not finite")
        return float(value)

    def count(self, key: str) -> int:
        """A whole number of at least 0."""
        value = self._value(key, int, "a whole number")
        if value < 0:
            raise self.damage(key, "is negative")
        return int(value)

    def maybe(self, key: str, read: Callable[[str], T]) -> T | None:
        """None where the field is missing, null or NaN."""
        value = self.content.get(key) if isinstance(self.content, dict) else None
        return None if value is None or value != value else read(key)

    def check_schema(self) -> None:
        """Refuse a file that a later version wrote."""
        if self.count("schema") > SCHEMA:
            raise UsageError(
                f"{self.path} has schema {self.count('schema')}, and this version reads up to {SCHEMA}: "
                "update Tierbench, or run the suite again"
            )


def flat(content: Mapping[str, Any]) -> dict[str, str]:
    """Every value as text, nested keys joined by a dot."""
    return {key: "-" if value is None else str(value) for key, value in _leaves(content)}


def numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """Every finite number, nested keys joined by a dot."""
    return {
        key: float(value)
        for key, value in _leaves(content)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _leaves(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
