"""Flags of commands: how one is added, and what it can take.

It knows `argparse` and no command.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from engine.units import parse_bytes

Group: TypeAlias = argparse._ActionsContainer
"""A parser or a group of its flags."""

FIXED_PADDING = 256
"""FlexGen's HELM application pads prompts to a multiple of this many tokens."""


def size(text: str) -> int:
    """A flag's size in bytes."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def padding(text: str) -> int:
    """A flag's multiple of tokens."""
    words = {"none": 0, "fixed": FIXED_PADDING}
    if text not in words and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not none, fixed or a whole number of tokens")
    return words[text] if text in words else int(text)


def positive(text: str) -> int:
    """A flag's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def some(text: str) -> str:
    """A flag's text, which must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give a value or leave the flag out")
    return text


def number(is_valid: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """The type of a flag's number: it is refused as not ``wanted`` unless it is valid."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


SWITCH = {"action": "store_true"}
COUNT = {"type": positive, "metavar": "N"}
FILE = {"type": Path, "metavar": "FILE"}
FOLDER = {"type": Path, "metavar": "FOLDER"}


def several(metavar: str) -> dict[str, Any]:
    """What a flag takes that has one or more values and can be given more than once."""
    return {"nargs": "+", "action": "extend", "default": [], "metavar": metavar}


def add_flag(
    group: Group, flags: str, text: str = "", kind: Mapping[str, Any] = {}, default: Any = None, **how: Any
) -> None:
    """Add a flag.

    Args:
        flags: its names, such as ``-m --max-eval-instances``.
        text: its help, to which a default that is one value is added.
        kind: what it takes: `SWITCH`, `COUNT`, `FILE`, `FOLDER`, `several`; one text if nothing is given.
        how: further arguments of `argparse.ArgumentParser.add_argument`.
    """
    if default is not None:
        how["default"] = default
    if isinstance(default, str | float | Path) or type(default) is int:
        text = f"{text} (default: %(default)s)" if text else "default: %(default)s"
    group.add_argument(*flags.split(), help=text, **kind, **how)
