"""In how many bits recurrent and convolution state is kept between passes."""

from __future__ import annotations

from enum import StrEnum


class StateFormat(StrEnum):
    """Formats of state."""

    FLOAT32 = "float32"
    """As it is computed, which is float32 on a CPU."""

    BFLOAT16 = "bfloat16"

    INT8 = "8"
    """Integers of 8 bits with a scale for every row; rows too short for one in bfloat16."""
