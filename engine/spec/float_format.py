"""A matrix of 16-bit floats: weights as their checkpoint holds them, a KV cache in half the bytes.

Where a processor has no fast 16-bit arithmetic such a matrix is one more packed form: it is read where it
lies and each value becomes float32 on its way into the product, exactly. A block is one row of ``width``
little-endian numbers, with no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import PolicyError
from engine.spec.quant import Along, QuantSpec

FLOAT_KINDS = ("float16", "bfloat16")


@dataclass(frozen=True)
class FloatSpec:
    """Raw 16-bit floats, with the properties that a packed matrix asks of a `QuantSpec`."""

    dtype: str
    """One of `FLOAT_KINDS`."""

    bits = activation_bits = 16
    """Of one value; a product rounds no activations."""

    along, block_rows = Along.ROW, 1
    """A block is one row of the matrix."""

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_KINDS:
            raise PolicyError(f"{self.dtype!r} is not a 16-bit float: use {' or '.join(FLOAT_KINDS)}")

    def blocks(self, rows: int) -> int:
        """Blocks that ``rows`` rows take."""
        return rows

    def block_bytes(self, width: int) -> int:
        """Bytes of one row."""
        return 2 * width

    def nbytes(self, rows: int, width: int) -> int:
        """Bytes of a matrix."""
        return rows * self.block_bytes(width)

    def bits_per_value(self) -> float:
        """Bits per value."""
        return 16.0

    def __str__(self) -> str:
        return self.dtype


MatrixForm = QuantSpec | FloatSpec
"""How a `PackedMatrix` is kept."""
