"""Where bytes lie in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Extent:
    """Consecutive bytes of one file.

    In the packed store they begin at a multiple of `engine.spec.layout.ALIGNMENT`; in a checkpoint's own file
    anywhere, so that a read past the page cache has to begin before them.
    """

    path: Path

    offset: int
    """Bytes from the file's beginning."""

    nbytes: int

    @property
    def end(self) -> int:
        """Offset of the first byte behind them."""
        return self.offset + self.nbytes
