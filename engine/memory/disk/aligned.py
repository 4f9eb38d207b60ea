"""Memory that begins at a page, as reads past the page cache want it, taken from the system directly."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from engine.spec.layout import ALIGNMENT


def empty_aligned(nbytes: int) -> Tensor:
    """A uint8 CPU tensor whose first byte lies at a multiple of `ALIGNMENT`; its values are not defined.

    Every page is touched here, so that it costs no page fault later, and goes back to the system with
    the tensor's last reference. Huge pages are asked for: touching is about four times faster then, and
    again up to twice by all of torch's threads.

    Raises:
        OSError: if the system does not have the memory.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    memory = _pages(nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    return tensor.zero_()


def small_buffer(nbytes: int) -> memoryview:
    """Aligned memory that is no tensor; for what belongs to the process rather than to a run."""
    return memoryview(_pages(nbytes))


def _pages(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def span(offset: int, nbytes: int) -> tuple[int, int]:
    """Begin and end of the aligned range that encloses ``nbytes`` at ``offset``."""
    return offset // ALIGNMENT * ALIGNMENT, -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT
