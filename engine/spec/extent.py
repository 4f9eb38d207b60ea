"""A run of bytes of some file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Extent:
    """Where the bytes of a tensor lie."""

    path: Path
    offset: int
    nbytes: int
