"""The points at which a machine is measured, as many as there is time for."""

from __future__ import annotations

from dataclasses import dataclass

from engine.profiling import attention, layers, links, products
from engine.units import KIB, MIB

_TINY = ((64, 64), (256, 64))
"""Shapes so small that the call takes most of a product's time."""


@dataclass(frozen=True)
class Scope:
    """The points of each table, bytes of the scratch file, passes and width of the small model."""

    rows: tuple[int, ...] = products.ROWS
    shapes: tuple[tuple[int, int], ...] = (*_TINY, *products.SHAPES)
    forms: tuple[str, ...] | None = None
    lengths: tuple[int, ...] = attention.LENGTHS
    contexts: tuple[int, ...] = attention.CONTEXTS
    sequences: tuple[int, ...] = attention.SEQUENCES
    sharing: tuple[int, ...] = attention.SHARING
    kv_forms: tuple[str, ...] = attention.FORMS
    appended: tuple[int, ...] = (1, 16, 256)
    tokens: tuple[int, ...] = layers.TOKENS
    widths: tuple[int, ...] = layers.WIDTHS
    logits: tuple[int, ...] = layers.LOGITS
    sizes: tuple[int, ...] = links.SIZES
    disk_bytes: int = 512 * MIB
    memory_bytes: int = 256 * MIB
    passes: int = 24
    hidden: int = 512
    whole: int = 1024
    """Width of the model over which whole passes are timed."""

    @classmethod
    def within(cls, seconds: float) -> Scope:
        """What can be measured in about ``seconds``."""
        if seconds >= 30:
            return cls()
        if seconds >= 5:
            return cls(
                rows=(1, 4, 16, 64, 256), shapes=(*_TINY, (512, 512), (2048, 2048)), lengths=(32, 256),
                contexts=(32, 256), sequences=(1, 8), kv_forms=("4",), tokens=(16, 256), widths=(256, 1024),
                sizes=(64 * KIB, 1 * MIB, 16 * MIB), disk_bytes=256 * MIB, passes=12,
            )  # fmt: skip
        return cls(
            rows=(1, 16), shapes=_TINY, forms=("float32", "4"), lengths=(16,), contexts=(16,),
            sequences=(1, 2), sharing=(1,), kv_forms=("4",), appended=(1, 16),
            tokens=(16,), widths=(64,), logits=(1,), sizes=(64 * KIB, 1 * MIB),
            disk_bytes=4 * MIB, memory_bytes=8 * MIB, passes=3, hidden=64, whole=64,
        )  # fmt: skip
