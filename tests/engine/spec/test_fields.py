"""Stored JSON is read by the fields' types, and what is damaged is named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest

from engine.spec.fields import FieldError, Signed, read_fields


@dataclass(frozen=True)
class Part:
    count: int
    change: Signed = 0


@dataclass(frozen=True)
class Whole:
    kind: Literal["one", "two"]
    rate: float
    parts: Sequence[Part]
    named: Mapping[str, Part]
    maybe: Part | None
    about: Any = None
    note: str = ""


GOOD = Whole("one", 0.5, (Part(1), Part(2, -3)), {"a": Part(4)}, None, ["anything"])
JSON = {**asdict(GOOD), "parts": [asdict(part) for part in GOOD.parts]}


def test_what_was_written_is_read_back() -> None:
    assert read_fields(Whole, JSON | {"unknown": 1}) == GOOD
    assert (
        read_fields(Whole, {key: JSON[key] for key in ("kind", "rate", "parts", "named", "maybe")}).note == ""
    )
    assert read_fields(Whole, JSON | {"maybe": {}}) == GOOD
    assert math.isnan(read_fields(Whole, JSON | {"rate": math.nan}).rate)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"kind": "three"}, "kind is none of one, two"),
        ({"rate": "fast"}, "rate is not a number"),
        ({"rate": True}, "rate is not a number"),
        ({"rate": math.inf}, "rate is not finite"),
        ({"parts": {}}, "parts is not a list"),
        ({"parts": [{"count": 1}, {"count": -1}]}, r"parts\[1\]\.count is negative"),
        ({"named": [1]}, "named is not an object"),
        ({"named": {"a": {}}}, r"named\.a\.count is missing"),
        ({"maybe": {"count": 0.5}}, r"maybe\.count is not a whole number"),
        ({"note": 3}, "note is not a text"),
    ],
)
def test_damage_is_named(damage: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        read_fields(Whole, JSON | damage)


def test_content_that_is_no_object() -> None:
    with pytest.raises(FieldError, match="the content is not an object"):
        read_fields(Part, [1])
