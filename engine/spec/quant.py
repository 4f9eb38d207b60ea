"""How a matrix is kept in few bits: group-wise rounding to nearest, and where its bytes lie.

A matrix is cut into *groups* of values that share a scale. Groups lie along a row (a weight's input
dimension, the channels of one token) or along a column (a weight's output dimension, one channel
over consecutive tokens). A group of g values at b bits becomes g codes from 0 to 2**b - 1 and

    minimum:  x = minimum + code * scale          scale and minimum in fp16 (FlexGen paper, section 5)
    zero:     x = (code - zero) * scale           scale and zero point in fp16 (GPTQ, AWQ)
    middle:   x = (code - 2**(b-1)) * scale       scale in fp16 (symmetric)

**Blocks.** A packed matrix is a sequence of blocks of equal size: one row each where groups lie along
rows, g rows each where they lie along columns. A block holds codes, then scales, then minima or zero
points. Codes are kept in *planes* of 4, 2 or 1 bits, so that 3 bits take 3 bits; a plane of p bits has
f = 8/p values in a byte, which stand g/f apart: byte j of the plane holds, from its lowest bits up,
values j, j + g/f, j + 2g/f, ... of the group.

    along rows:     for each group (for each plane: g*p/8 bytes); scales [groups]; minima [groups]
    along columns:  for each plane ([g*p/8 rows, width] bytes);   scales [width];  minima [width]
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from engine.errors import PolicyError

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Per number of bits: the bits of each plane that its codes are kept in, the low bits first."""

WHOLE_ROW = 0
"""Group size that stands for as many values as a row has."""

_LARGEST_GROUP = 65536


class Offset(StrEnum):
    """What a group keeps beside its scale."""

    MINIMUM = "minimum"
    ZERO = "zero"
    MIDDLE = "middle"


class Along(StrEnum):
    """Where the values of a group lie."""

    ROW = "row"
    COLUMN = "column"


class Fit(StrEnum):
    """How scale and offset of a group are chosen."""

    RANGE = "range"
    """The group's extremes are the first and the last code."""

    ERROR = "mse"
    """The range, possibly narrower, that has the least squared error (like HQQ without calibration data)."""


@dataclass(frozen=True)
class QuantSpec:
    """One format of a packed matrix.

    Written as ``bits`` and options joined by ``-``: ``4``, ``4-g32``, ``3-mse``, ``4-symmetric``,
    ``4-column`` (groups along the output dimension of a weight, or per channel of the KV cache),
    ``8-row-symmetric-a8`` (one group per row, activations rounded to 8 bits).

    Rounded activations and codes are multiplied as integers, so that what an integer stands for may change
    along the summed dimension only from group to group: symmetric groups along rows.
    """

    bits: int = 4
    group_size: int = 64
    """Values that share one scale; `WHOLE_ROW` for all values of a row."""

    offset: Offset = Offset.MINIMUM
    along: Along = Along.ROW
    fit: Fit = Fit.RANGE

    activation_bits: int = 16
    """8: a matrix product rounds its activations, too, to 8 bits, per token and group of weights; 16: it does
    not."""

    def __post_init__(self) -> None:
        if self.bits not in PLANES:
            raise PolicyError(f"{self.bits} bits are not available: use 2, 3, 4, 8 or 16 (uncompressed)")
        size = self.group_size
        if size != WHOLE_ROW and (size < 8 or size % 8 or size > _LARGEST_GROUP):
            raise PolicyError(f"a group of {size} values is not a multiple of 8 above 0: use 32, 64 or 128")
        if size == WHOLE_ROW and self.along is Along.COLUMN:
            raise PolicyError("groups along columns need a size: write for instance g64")
        if self.activation_bits not in (8, 16):
            raise PolicyError(f"activations of {self.activation_bits} bits are not available: use a8")
        symmetric_rows = self.offset is Offset.MIDDLE and self.along is Along.ROW
        sizes = {4: (32, 64, 128), 8: (WHOLE_ROW,)}.get(self.bits, ())  # of groups whose integers are summed
        if self.activation_bits == 8 and not (symmetric_rows and self.group_size in sizes):
            raise PolicyError(
                "a8 wants symmetric groups along rows, of 8 bits and a whole row, or of 4 bits and 32, 64 or "
                "128 values: use w8a8 or w4a8"
            )

    def replace(self, **changes: object) -> QuantSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    @property
    def levels(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @property
    def has_offsets(self) -> bool:
        """Whether a minimum or a zero point is stored per group."""
        return self.offset is not Offset.MIDDLE

    @property
    def block_rows(self) -> int:
        """Rows of the matrix that one block holds."""
        return 1 if self.along is Along.ROW else self.group_size

    def group(self, width: int) -> int:
        """Values of one group in rows of ``width`` values."""
        return self.group_size or max(8, -(-width // 8) * 8)

    def groups(self, width: int) -> int:
        """Groups of one block; along rows the last one is padded."""
        return width if self.along is Along.COLUMN else -(-width // self.group(width))

    def code_bytes(self, width: int) -> int:
        """Bytes of one block's codes."""
        return self.groups(width) * self.group(width) * self.bits // 8

    def block_bytes(self, width: int) -> int:
        """Bytes of one block of a matrix whose rows have ``width`` values."""
        return self.code_bytes(width) + self.groups(width) * (4 if self.has_offsets else 2)

    def blocks(self, rows: int) -> int:
        """Blocks that ``rows`` rows take; along columns the last one is padded."""
        return -(-rows // self.block_rows)

    def nbytes(self, rows: int, width: int) -> int:
        """Bytes of a packed matrix."""
        return self.blocks(rows) * self.block_bytes(width)

    def bits_per_value(self) -> float:
        """Bits per value with the group's numbers, for rows that groups divide evenly; 4.5 for ``4-g64``."""
        if self.group_size == WHOLE_ROW:
            return float(self.bits)
        return self.bits + (32 if self.has_offsets else 16) / self.group_size

    def __str__(self) -> str:
        words = [str(self.bits)]
        if self.group_size != 64:
            words.append("row" if self.group_size == WHOLE_ROW else f"g{self.group_size}")
        words += [
            word
            for word, (field, value) in _WORDS.items()
            if field != "group_size" and getattr(self, field) == value
        ]
        return "-".join(words)

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read what ``str`` writes, or the name of a format (`FORMATS`).

        Raises:
            PolicyError: naming the word that is not understood.
        """
        if text in FORMATS:
            return FORMATS[text]
        first, *words = text.split("-")
        if not first.isdecimal():
            raise PolicyError(
                f"{text!r} is not a format: write bits such as 4 or 3-g32-mse, or one of {', '.join(FORMATS)}"
            )
        fields: dict[str, object] = {"bits": int(first)}
        for word in words:
            word = _SYNONYMS.get(word, word)
            if word in _WORDS:
                field, value = _WORDS[word]
            elif re.fullmatch(r"g\d{1,9}", word):
                field, value = "group_size", int(word[1:]) or -1
            else:
                known = ", ".join(["g32", "g64", "g128", *_WORDS])
                raise PolicyError(f"{word!r} in format {text!r} is unknown: use {known}")
            if field in fields:
                raise PolicyError(f"format {text!r} says its {field.replace('_', ' ')} twice")
            fields[field] = value
        return cls(**fields)  # type: ignore[arg-type]


_WORDS: dict[str, tuple[str, object]] = {
    "row": ("group_size", WHOLE_ROW),
    "symmetric": ("offset", Offset.MIDDLE),
    "zero": ("offset", Offset.ZERO),
    "column": ("along", Along.COLUMN),
    "mse": ("fit", Fit.ERROR),
    "a8": ("activation_bits", 8),
}
_SYNONYMS = {"sym": "symmetric", "output": "column", "channel": "column"}

FORMATS: dict[str, QuantSpec] = {
    "flexgen": QuantSpec(4, 64, along=Along.COLUMN),
    "best4": QuantSpec(4, 32, Offset.MIDDLE, Along.COLUMN, Fit.ERROR),
    "w8a8": QuantSpec(8, WHOLE_ROW, Offset.MIDDLE, activation_bits=8),
    "w4a8": QuantSpec(4, 32, Offset.MIDDLE, fit=Fit.ERROR, activation_bits=8),
}
"""Named formats of weights.

``flexgen`` groups a weight along its output dimension, as FlexGen does. So does ``best4``: a column of a
weight belongs to one input channel, and where activations are large weights tend to be small, so that a
scale per input channel and group of outputs spends its codes where they count. ``w4a8`` has the bits and
groups of GGML's Q4_0 and, as that does, rounds what it is multiplied with.
"""
