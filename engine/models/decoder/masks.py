"""Which past tokens a layer sees, as `transformers` says it by the mask that it asks for.

Packed tokens have no mask of tokens x tokens; where a base model makes one for a sliding window or for
chunks, its layers are handed a few numbers in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import AttentionMaskInterface


@dataclass(frozen=True)
class Visible:
    """Stands for a causal mask that hides old tokens."""

    window: int | None = None
    """Number of newest tokens that are visible, the query's own among them; None for all."""

    chunk: int | None = None
    """Tokens see those of the same chunk of so many positions; None where there are no chunks."""


def describe_mask(
    *args: Any, mask_function: Callable[..., Any], local_size: int | None = None, **kwargs: Any
) -> Visible | None:
    """What stands for a mask; signature of `AttentionMaskInterface`. None for a plain causal one."""
    if local_size is None:
        return None
    if any(function.__qualname__.startswith("chunked_overlay") for function in _parts(mask_function)):
        return Visible(chunk=local_size)
    return Visible(window=local_size)


def _parts(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A mask function and those that it is made of."""
    yield function
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for part in held if isinstance(held, (tuple, list)) else (held,):
            if callable(part) and hasattr(part, "__qualname__"):
                yield from _parts(part)


def register(name: str) -> None:
    """Let models with this attention implementation be given descriptions in place of masks."""
    AttentionMaskInterface.register(name, describe_mask)
