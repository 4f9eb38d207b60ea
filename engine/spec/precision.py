"""How exactly float32 activations are multiplied where a processor has a faster, coarser unit.

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
        """Into how many bfloat16 a number is taken apart; 0 for not at all."""
        return _PARTS[self]

    def product_of(self, form: str) -> str:
        """How a hardware profile calls the rates of products with weights kept in a form."""
        return form if self is MatmulPrecision.HIGHEST else f"{form}@{self}"


_PARTS = {MatmulPrecision.HIGHEST: 0, MatmulPrecision.HIGH: 2, MatmulPrecision.MEDIUM: 1}
