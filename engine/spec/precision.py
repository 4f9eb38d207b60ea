"""Precision of products of float32 activations on processors that have a faster, coarser unit.

The words are those of ``torch.set_float32_matmul_precision``.
"""

from __future__ import annotations

from enum import StrEnum

VECTOR_ROWS = 16
"""Products of so few rows are of float32 at every precision: reading the weights is what they cost."""


class MatmulPrecision(StrEnum):
    """Of products whose rows are many; where no such unit is, or it is not faster, all are as the first."""

    HIGHEST = "highest"
    """float32."""

    HIGH = "high"
    """Each number as the sum of two bfloat16 (16 bits of fraction together), sums in float32."""

    MEDIUM = "medium"
    """Each number as the nearest bfloat16 (8 bits of fraction), sums in float32."""

    @property
    def parts(self) -> int:
        """How many bfloat16 numbers a float32 is split into; 0 if it is not."""
        return _PARTS[self]

    def product_of(self, form: str) -> str:
        """The key in a hardware profile of products with weights in a format."""
        return form if self is MatmulPrecision.HIGHEST else f"{form}@{self}"


_PARTS = {MatmulPrecision.HIGHEST: 0, MatmulPrecision.HIGH: 2, MatmulPrecision.MEDIUM: 1}
