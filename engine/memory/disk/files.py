"""Files that are read and written past the page cache, at any offset and from any memory.

Where a piece's place in the file and in memory allow it, the device moves it straight; what remains at
its edges, and small pieces, go through a small aligned buffer. Where the file system refuses direct
I/O, the same requests go through the page cache and are dropped from it afterwards. This module does
not know what the bytes mean, nor whose file it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from engine.errors import StorageError
from engine.memory.disk.aligned import empty_aligned, memory_of, small_buffer, span
from engine.memory.disk.io_pool import BOUNCE_BYTES, IOPool
from engine.spec.layout import ALIGNMENT
from engine.units import format_bytes

__all__ = ["DirectFile", "IOPool", "empty_aligned", "read_pieces", "span", "storage_errors", "write_pieces"]

_CURES = {
    errno.ENOSPC: "free space or choose another --offload-dir",
    errno.EDQUOT: "free space or choose another --offload-dir",
    errno.EMFILE: "lower the block, or raise the limit of open files (ulimit -n)",
}


class storage_errors:
    """Turns the operating system's errors into one clear line."""

    def __init__(self, path: Path, action: str) -> None:
        self._path, self._action = path, action

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            cure = _CURES.get(error.errno or 0, "check the disk")
            raise StorageError(f"cannot {self._action} {self._path}: {error.strerror}: {cure}") from error


class DirectFile:
    """A file of fixed size, read and written at offsets from any thread.

    Whole blocks of `ALIGNMENT` bytes go past the page cache. The last block, if the size ends within
    it, never does: a block belongs to one of the two ways for good, so that they cannot contradict
    each other.

    Attributes:
        path: where it is.
        size: its bytes.
        buffered: its descriptor for requests that go through the page cache; negative once closed.
        direct: whether its whole blocks go past the page cache.
        reason: why not; empty where they do.
    """

    def __init__(self, path: Path, pool: IOPool, create: int | None = None) -> None:
        """Open a file to read, or create one of ``create`` bytes with its space reserved.

        Raises:
            StorageError: if it cannot be opened or created, or the disk is full.
        """
        self.path, self.pool = path, pool
        self._edges = _Blocks()
        self._direct = -1
        flags = os.O_RDONLY if create is None else os.O_RDWR
        what = "open" if create is None else f"reserve {format_bytes(create)} in"
        with storage_errors(path, what):
            self.buffered = os.open(path, flags if create is None else flags | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                if create:
                    os.posix_fallocate(self.buffered, 0, create)
                self.size = os.fstat(self.buffered).st_size if create is None else create
                self.reason = self._go_direct(flags)
            except BaseException:
                self.close()
                if create is not None:
                    path.unlink(missing_ok=True)
                raise
            if self.reason:  # what is read ahead would stay behind in the page cache
                os.posix_fadvise(self.buffered, 0, 0, os.POSIX_FADV_RANDOM)
        self.direct = not self.reason
        self.direct_end = self.size // ALIGNMENT * ALIGNMENT if self.direct else 0
        """Where the bytes begin that go through the page cache."""

    def read(self, offset: int, into: Tensor) -> int:
        """Fill a contiguous CPU tensor with the bytes at ``offset``; returns how many.

        Raises:
            StorageError: if the disk fails or the file is too short.
        """
        return read_pieces([(self, offset, into)])

    def write(self, offset: int, source: Tensor) -> int:
        """Write a contiguous CPU tensor's bytes at ``offset``; returns how many.

        Raises:
            StorageError: if the disk fails.
        """
        return write_pieces([(self, offset, source)])

    def read_many(self, pieces: Sequence[tuple[int, Tensor]]) -> int:
        """Fill several tensors, several requests in flight; see `read_pieces`."""
        return read_pieces([(self, offset, into) for offset, into in pieces])

    def write_many(self, pieces: Sequence[tuple[int, Tensor]]) -> int:
        """Write several tensors, several requests in flight; see `write_pieces`."""
        return write_pieces([(self, offset, source) for offset, source in pieces])

    def sync(self) -> None:
        """Bring everything written to the device itself.

        Raises:
            StorageError: if the disk fails.
        """
        with storage_errors(self.path, "write"):
            os.fdatasync(self.buffered)

    def close(self) -> None:
        """Close the file; no request may be going on."""
        self.pool.forget(self)
        descriptors, self._direct, self.buffered = (self._direct, self.buffered), -1, -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.buffered < 0

    def _go_direct(self, flags: int) -> str:
        """Open the second descriptor; returns why not, if the file system or the size forbids it."""
        if self.size < ALIGNMENT:
            return "smaller than a block"
        if not hasattr(os, "O_DIRECT"):
            return "this system knows no direct I/O"
        kind = os.fstat(self.buffered).st_dev, flags
        if kind not in self.pool.refusals:
            self.pool.refusals[kind] = ""
            try:
                self._direct = os.open(self.path, flags | os.O_DIRECT)
                _probe(self._direct, writable=flags == os.O_RDWR)
            except OSError as error:
                del self.pool.refusals[kind]
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                if self._direct >= 0:
                    os.close(self._direct)
                    self._direct = -1
                self.pool.refusals[kind] = f"the file system refuses direct I/O ({error.strerror})"
        elif not self.pool.refusals[kind]:
            self._direct = os.open(self.path, flags | os.O_DIRECT)
        return self.pool.refusals[kind]

    def _move(self, offset: int, view: memoryview, writing: bool) -> None:
        """Read or write within the whole blocks, aligned, or within the rest."""
        direct = offset < self.direct_end
        descriptor = self._direct if direct else self.buffered
        done = 0
        with storage_errors(self.path, "write" if writing else "read"):
            while done < len(view):
                call = os.pwritev if writing else os.preadv
                count = call(descriptor, [view[done:]], offset + done)
                step = count // ALIGNMENT * ALIGNMENT if direct else count
                if done + count >= len(view):
                    break
                if not step:
                    raise StorageError(
                        f"{self.path} ends at byte {offset + done + count:,}: it was changed from outside"
                    )
                done += step
            if not self.direct:
                self._forget(offset, len(view), writing)

    def _forget(self, offset: int, count: int, writing: bool) -> None:
        """Drop from the page cache what went through it."""
        if not writing:
            os.posix_fadvise(self.buffered, offset, count, os.POSIX_FADV_DONTNEED)
            return
        for file in self.pool.too_much_unsynced(self, count):
            if not file.closed:
                os.fdatasync(file.buffered)
                os.posix_fadvise(file.buffered, 0, 0, os.POSIX_FADV_DONTNEED)


def _probe(descriptor: int, writable: bool) -> None:
    """Try what only a real request tells; a new file's first block is written with zeros.

    Raises:
        OSError: if the file system refuses.
    """
    block = small_buffer(ALIGNMENT)
    os.preadv(descriptor, [block], 0)
    if writable:
        os.pwritev(descriptor, [block], 0)


def read_pieces(pieces: Sequence[tuple[DirectFile, int, Tensor]]) -> int:
    """Fill contiguous CPU tensors with the bytes at offsets of files; returns how many bytes that were.

    Large pieces are fast where (offset - address) is a multiple of `ALIGNMENT`. All files share the
    first one's pool.

    Raises:
        StorageError: the first that was met, once no request is going on.
    """
    return _transfer(pieces, writing=False)


def write_pieces(pieces: Sequence[tuple[DirectFile, int, Tensor]]) -> int:
    """Write contiguous CPU tensors at offsets of files; returns how many bytes that were.

    Pieces may share a block, within one call or from several threads, but no byte. Large ones are fast
    where (offset - address) is a multiple of `ALIGNMENT`; blocks that are not covered are read first.

    Raises:
        StorageError: the first that was met, once no request is going on.
    """
    return _transfer(pieces, writing=True)


def _transfer(pieces: Sequence[tuple[DirectFile, int, Tensor]], writing: bool) -> int:
    straight: list[_Piece] = []
    small: list[_Piece] = []
    total = 0
    for file, offset, tensor in pieces:
        piece = _Piece(file, offset, memory_of(tensor))
        if piece.end > file.size:
            assert not writing, f"{file.path} has no byte {piece.end:,}"
            raise StorageError(f"{file.path} ends at byte {file.size:,}: it was changed from outside")
        _split(piece, (offset - tensor.data_ptr()) % ALIGNMENT == 0, straight, small)
        total += len(piece.view)
    requests: list[Callable[[], None]] = []
    if straight:
        share = straight[0].file.pool.share(sum(len(piece.view) for piece in straight))
        for piece in straight:
            for at in range(piece.offset, piece.end, share):
                part = piece.part(at, min(at + share, piece.end))
                requests.append(partial(part.file._move, part.offset, part.view, writing))
    requests += [partial(_write_group if writing else _read_group, group) for group in _groups(small)]
    if requests:
        pieces[0][0].pool.run(requests)
    return total


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a file and their memory."""

    file: DirectFile
    offset: int
    view: memoryview

    @property
    def end(self) -> int:
        return self.offset + len(self.view)

    def part(self, begin: int, end: int) -> _Piece:
        return _Piece(self.file, begin, self.view[begin - self.offset : end - self.offset])


def _split(piece: _Piece, congruent: bool, straight: list[_Piece], small: list[_Piece]) -> None:
    """Sort a piece's parts into those that are moved straight and those that go through a buffer."""
    body = min(piece.end, piece.file.direct_end)
    if piece.end > body:
        straight.append(piece.part(max(body, piece.offset), piece.end))
    if piece.offset >= body:
        return
    first, last = -(-piece.offset // ALIGNMENT) * ALIGNMENT, body // ALIGNMENT * ALIGNMENT
    at = piece.offset
    if congruent and ((first == at and last == body) or last - first > BOUNCE_BYTES):
        if at < first:
            small.append(piece.part(at, first))
        straight.append(piece.part(first, last))
        at = last
    while at < body:
        end = min(body, at // ALIGNMENT * ALIGNMENT + BOUNCE_BYTES)
        small.append(piece.part(at, end))
        at = end


def _groups(small: list[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that lie in the same or neighbouring blocks, as far as a bounce buffer holds them."""
    group: list[_Piece] = []
    begin = end = 0
    for piece in sorted(small, key=lambda piece: (id(piece.file), piece.offset)):
        low, high = span(piece.offset, len(piece.view))
        if group and piece.file is group[0].file and low <= end and high - begin <= BOUNCE_BYTES:
            end = max(end, high)
        else:
            if group:
                yield group
            group, begin, end = [], low, high
        group.append(piece)
    if group:
        yield group


def _bounds(group: list[_Piece]) -> tuple[int, int]:
    return span(group[0].offset, max(piece.end for piece in group) - group[0].offset)


def _read_group(group: list[_Piece]) -> None:
    file, (begin, end) = group[0].file, _bounds(group)
    with file.pool.bounce() as buffer:
        file._move(begin, buffer[: end - begin], writing=False)
        for piece in group:
            piece.view[:] = buffer[piece.offset - begin : piece.end - begin]


def _write_group(group: list[_Piece]) -> None:
    """Write blocks whose bytes may be somebody else's in part: those are read first, and locked."""
    file, (begin, end) = group[0].file, _bounds(group)
    runs = list(_uncovered(group, begin, end))
    blocks = {block for low, high in runs for block in range(low, high, ALIGNMENT)}
    with file.pool.bounce() as buffer, file._edges.held(blocks):
        for low, high in runs:
            file._move(low, buffer[low - begin : high - begin], writing=False)
        for piece in group:
            buffer[piece.offset - begin : piece.end - begin] = piece.view
        file._move(begin, buffer[: end - begin], writing=True)


def _uncovered(group: list[_Piece], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of blocks that the pieces do not fill, which lie sorted between two block borders."""
    low = high = begin
    at = begin
    for offset, stop in [*((piece.offset, piece.end) for piece in group), (end, end)]:
        if offset > at:
            gap = span(at, offset - at)
            if gap[0] > high:
                if high > low:
                    yield low, high
                low = gap[0]
            high = gap[1]
        at = max(at, stop)
    if high > low:
        yield low, high


class _Blocks:
    """Blocks that are being read, changed and written back."""

    def __init__(self) -> None:
        self._busy: set[int] = set()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def held(self, blocks: set[int]) -> Iterator[None]:
        """Wait until nobody else holds any of the blocks, and hold them all."""
        if not blocks:
            yield
            return
        with self._changed:
            while not self._busy.isdisjoint(blocks):
                self._changed.wait()
            self._busy |= blocks
        try:
            yield
        finally:
            with self._changed:
                self._busy -= blocks
                self._changed.notify_all()
