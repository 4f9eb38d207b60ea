"""Single rows of an embedding table outside device memory: a pass needs few of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.errors import StorageError
from engine.memory.disk.aligned import memory_of, span
from engine.memory.disk.files import DirectFile
from engine.memory.weights.buffers import StoredWeight
from engine.units import KIB, MIB

GAP_BYTES = 16 * KIB
"""Two rows with a gap of at most this many bytes are read together: a second request takes longer."""

CACHED_BYTES = 32 * MIB
"""Max bytes of rows in the page cache at a time: where memory is short, the system evicts them unread."""


def gather(stored: StoredWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up rows of a table: ids [...] int64 -> [..., width], in ``dtype`` on the device of ``ids``.

    Raises:
        StorageError: if the disk fails.
    """
    kept = stored.kept
    wanted, places = torch.unique(ids.reshape(-1), return_inverse=True)
    form_dtype = getattr(torch, kept.dtype if kept.form is None else str(kept.form))
    width = kept.tensor.shape[1]
    rows = torch.empty(len(wanted), width, dtype=form_dtype)
    if stored.file is not None:
        read_rows(stored.file, stored.offset, wanted.tolist(), rows)
    else:
        table = stored.resident.view(-1).view(form_dtype).view(-1, width)
        torch.index_select(table, 0, wanted.to(table.device), out=rows)
    found = rows.to(ids.device, dtype)[places]
    return found.view(*ids.shape, width)


def read_rows(file: DirectFile, offset: int, rows: Sequence[int], into: Tensor) -> int:
    """Fill a contiguous CPU tensor with single rows of the table at ``offset``; returns the number of bytes.

    Past the page cache every row would have to be waited for. Instead many are prefetched into it at once,
    copied as they arrive, and dropped from it.

    Args:
        rows: indices in ascending order.
        into: [len(rows), ...], each row as long as one of the table.

    Raises:
        StorageError: if the disk fails or the file is too short.
    """
    if not rows:
        return 0
    view, size = memory_of(into), into.nbytes // len(rows)
    most = max(1, CACHED_BYTES // (size + GAP_BYTES))
    with file.errors(file.path, "read"):
        for first in range(0, len(rows), most):
            places = [offset + row * size for row in rows[first : first + most]]
            _read_places(file, places, view[first * size :], size)
    return len(view)


def _read_places(file: DirectFile, places: Sequence[int], view: memoryview, size: int) -> None:
    """Read pieces of one size at ascending offsets into adjacent memory."""
    for begin, end in _runs(places, size):
        os.posix_fadvise(file.buffered, begin, end - begin, os.POSIX_FADV_WILLNEED)
    for index, place in enumerate(places):
        if os.preadv(file.buffered, [view[index * size : (index + 1) * size]], place) < size:
            raise StorageError(f"{file.path} has no byte {place + size:,}: it was changed from outside")
    begin, end = span(
        places[0], places[-1] + size - places[0]
    )  # whole pages, as partly covered ones would stay
    os.posix_fadvise(file.buffered, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _runs(places: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Ranges (begin, end) of pieces of one size at ascending offsets, merged across short gaps."""
    begin = end = places[0]
    for place in places:
        if place - end > GAP_BYTES:
            yield begin, end
            begin = place
        end = place + size
    yield begin, end
