"""Memory that begins at a page, as reads past the page cache want it, taken from the system directly.

torch is imported only where tensors are made, so that the commands that list the store start quickly.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from engine.spec.layout import ALIGNMENT

if TYPE_CHECKING:
    from torch import Tensor


def empty_aligned(nbytes: int) -> Tensor:
    """A CPU tensor [nbytes] uint8 whose address is a multiple of `ALIGNMENT`; its values are undefined.

    Every page is touched here, so that it causes no page fault later, and goes back to the system with
    the tensor's last reference. Huge pages make touching about four times faster, and all of torch's
    threads up to twice as fast again.

    Raises:
        OSError: if the system does not have the memory.
    """
    import torch

    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    memory = _pages(nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    return tensor.zero_()


def small_buffer(nbytes: int) -> memoryview:
    """Aligned memory that belongs to the process, not to the ledger of a run."""
    return memoryview(_pages(nbytes))


def _pages(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor [...], without a copy."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data


def span(offset: int, nbytes: int) -> tuple[int, int]:
    """Begin and end of the smallest aligned range around ``nbytes`` at ``offset``."""
    return offset // ALIGNMENT * ALIGNMENT, -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT
