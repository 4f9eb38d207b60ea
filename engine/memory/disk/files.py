"""Files that are read and written past the page cache, at any offset and from any memory.

Where a piece's offset in the file and address in memory are congruent, the device transfers it directly;
unaligned edges and small pieces go through a small aligned bounce buffer. Where the file system refuses
direct I/O, the same requests go through the page cache and are dropped from it afterwards. The KV cache,
the weights and the packed store all use this module; it does not know what the bytes mean.
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
from typing import TYPE_CHECKING

from engine.errors import StorageError, storage_errors
from engine.memory.disk.aligned import memory_of, small_buffer, span
from engine.memory.disk.io_pool import BOUNCE_BYTES, IOPool
from engine.spec.layout import ALIGNMENT
from engine.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

StorageErrors = Callable[[Path, str], contextlib.AbstractContextManager[None]]
"""`storage_errors` with the cures of one kind of file."""

offload_errors = partial(storage_errors, elsewhere="choose another --offload-dir")


class DirectFile:
    """A file of fixed size, read and written at offsets from any thread.

    Whole blocks of `ALIGNMENT` bytes go past the page cache. If the size ends within a block, that last
    block always goes through it: no block is ever accessed in both ways, so they cannot disagree.

    Attributes:
        path: where it is.
        size: in bytes.
        buffered: descriptor for requests that go through the page cache, and for locks; negative once closed.
        direct: whether whole blocks go past the page cache.
        reason: why not; empty where they do.
        errors: turns an `OSError` about the file into one line.
    """

    def __init__(
        self,
        path: Path,
        pool: IOPool,
        create: int | None = None,
        errors: StorageErrors = offload_errors,
    ) -> None:
        """Open a file for reading, or create one of ``create`` bytes with its space reserved.

        Raises:
            StorageError: if it cannot be opened or created, or the disk is full.
        """
        self.path, self.pool, self.errors = path, pool, errors
        self.size, self.reason = 0, ""
        self._busy: set[int] = set()  # blocks that are being read, changed and written back
        self._freed = threading.Condition()
        self._direct = -1
        self._flags = os.O_RDONLY if create is None else os.O_RDWR
        exclusive = 0 if create is None else os.O_CREAT | os.O_EXCL
        with errors(path, "open" if create is None else "create"):
            self.buffered = os.open(path, self._flags | exclusive, 0o600)
        try:
            if create is None:
                with errors(path, "open"):
                    self._resize(os.fstat(self.buffered).st_size)
            else:
                self.reserve(create)
        except BaseException:
            self.close()
            if create is not None:
                path.unlink(missing_ok=True)
            raise

    def reserve(self, nbytes: int) -> None:
        """Reserve the space of a file that was created empty, so that a full disk shows now and not midway.

        Raises:
            StorageError: if the disk is full.
        """
        with self.errors(self.path, f"reserve {format_bytes(nbytes)} in"):
            if nbytes:
                os.posix_fallocate(self.buffered, 0, nbytes)
            self._resize(nbytes)

    def _resize(self, nbytes: int) -> None:
        self.size = nbytes
        self.reason = self._go_direct()
        if self.reason:  # what is read ahead would stay in the page cache
            os.posix_fadvise(self.buffered, 0, 0, os.POSIX_FADV_RANDOM)
        self.direct = not self.reason
        self.direct_end = nbytes // ALIGNMENT * ALIGNMENT if self.direct else 0
        """Bytes from here on go through the page cache."""

    def read(self, offset: int, into: Tensor) -> int:
        """Fill a contiguous CPU tensor [...] with the bytes at ``offset``; returns their number.

        Raises:
            StorageError: if the disk fails or the file is too short.
        """
        return transfer_pieces([(self, offset, into)], writing=False)

    def write(self, offset: int, source: Tensor) -> int:
        """Write the bytes of a contiguous CPU tensor [...] at ``offset``; returns their number.

        Raises:
            StorageError: if the disk fails.
        """
        return transfer_pieces([(self, offset, source)], writing=True)

    def read_many(self, pieces: Sequence[tuple[int, Tensor]]) -> int:
        """Fill tensors [...], several requests in flight; see `transfer_pieces`."""
        return transfer_pieces([(self, offset, into) for offset, into in pieces], writing=False)

    def write_many(self, pieces: Sequence[tuple[int, Tensor]]) -> int:
        """Write tensors [...], several requests in flight; see `transfer_pieces`."""
        return transfer_pieces([(self, offset, source) for offset, source in pieces], writing=True)

    def transfer_blocks(self, offset: int, view: memoryview, writing: bool) -> None:
        """Read or write in the calling thread: aligned whole blocks, or bytes from `direct_end` on.

        Raises:
            StorageError: if the disk fails or the file is too short.
        """
        direct = offset < self.direct_end
        descriptor = self._direct if direct else self.buffered
        done = 0
        try:
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
                self._drop(offset, len(view), writing)
        except OSError as error:  # entered here, the context costs small pieces nothing
            with self.errors(self.path, "write" if writing else "read"):
                raise error

    @contextlib.contextmanager
    def blocks_held(self, blocks: set[int]) -> Iterator[None]:
        """Wait until no other thread holds any of the blocks, then hold all of them."""
        if not blocks:
            yield
            return
        with self._freed:
            self._freed.wait_for(lambda: self._busy.isdisjoint(blocks))
            self._busy |= blocks
        try:
            yield
        finally:
            with self._freed:
                self._busy -= blocks
                self._freed.notify_all()

    def sync(self) -> None:
        """Bring everything that was written to the device itself and out of the page cache.

        Raises:
            StorageError: if the disk fails.
        """
        with self.errors(self.path, "write"):
            self._flush()

    def close(self) -> None:
        """Close the file; no request may be in flight."""
        self.pool.forget(self._flush)
        descriptors, self._direct, self.buffered = (self._direct, self.buffered), -1, -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.buffered < 0

    def _go_direct(self) -> str:
        """Open the second descriptor; returns why not, if the file system or the size forbids it."""
        if self.size < ALIGNMENT:
            return "smaller than a block"
        if not hasattr(os, "O_DIRECT"):
            return "this system has no direct I/O"
        kind, flags = (os.fstat(self.buffered).st_dev, self._flags), self._flags | os.O_DIRECT
        if kind not in self.pool.refusals:
            self.pool.refusals[kind] = ""
            try:
                self._direct = os.open(self.path, flags)
                _probe(self._direct, writable=self._flags == os.O_RDWR)
            except OSError as error:
                del self.pool.refusals[kind]
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                if self._direct >= 0:
                    os.close(self._direct)
                    self._direct = -1
                self.pool.refusals[kind] = f"the file system refuses direct I/O ({error.strerror})"
        elif not self.pool.refusals[kind]:
            self._direct = os.open(self.path, flags)
        return self.pool.refusals[kind]

    def _drop(self, offset: int, count: int, written: bool) -> None:
        """Drop from the page cache what went through it."""
        if not written:
            os.posix_fadvise(self.buffered, offset, count, os.POSIX_FADV_DONTNEED)
            return
        for flush in self.pool.note_unsynced(self._flush, count):
            flush()

    def _flush(self) -> None:
        if self.closed:  # since another file's writes asked for it
            return
        os.fdatasync(self.buffered)
        if not self.direct:
            os.posix_fadvise(self.buffered, 0, 0, os.POSIX_FADV_DONTNEED)


def _probe(descriptor: int, writable: bool) -> None:
    """Try a request, as only that tells; it writes zeros to the first block of a new file.

    Raises:
        OSError: if the file system refuses.
    """
    block = small_buffer(ALIGNMENT)
    os.preadv(descriptor, [block], 0)
    if writable:
        os.pwritev(descriptor, [block], 0)


def transfer_pieces(pieces: Sequence[tuple[DirectFile, int, Tensor]], writing: bool) -> int:
    """Read or write contiguous CPU tensors [...] at offsets of files; returns the number of bytes.

    Large pieces are fast where (offset - address) is a multiple of `ALIGNMENT`. Pieces that are written may
    share a block, within one call or from several threads, but no byte; blocks that are only partly covered
    are read first. All files share the first one's pool.

    Raises:
        StorageError: the first error, once no request is in flight.
    """
    direct: list[_Piece] = []
    small: list[_Piece] = []
    total = 0
    for file, offset, tensor in pieces:
        piece = _Piece(file, offset, memory_of(tensor))
        if piece.end > file.size:
            assert not writing, f"{file.path} has no byte {piece.end:,}"
            raise StorageError(f"{file.path} ends at byte {file.size:,}: it was changed from outside")
        _split(piece, (offset - tensor.data_ptr()) % ALIGNMENT == 0, direct, small)
        total += len(piece.view)
    requests: list[Callable[[], None]] = []
    if direct:
        share = direct[0].file.pool.share(sum(len(piece.view) for piece in direct))
        for piece in direct:
            for at in range(piece.offset, piece.end, share):
                part = piece.part(at, min(at + share, piece.end))
                requests.append(partial(part.file.transfer_blocks, part.offset, part.view, writing))
    requests += [partial(_write_group if writing else _read_group, group) for group in _groups(small)]
    if requests:
        pieces[0][0].pool.run(requests)
    return total


@dataclass(frozen=True, slots=True)
class _Piece:
    """A range of a file and the memory it is read into or written from."""

    file: DirectFile
    offset: int
    view: memoryview

    @property
    def end(self) -> int:
        return self.offset + len(self.view)

    def part(self, begin: int, end: int) -> _Piece:
        return _Piece(self.file, begin, self.view[begin - self.offset : end - self.offset])


def _split(piece: _Piece, congruent: bool, direct: list[_Piece], small: list[_Piece]) -> None:
    """Divide a piece into parts that are transferred directly and parts that go through a bounce buffer."""
    body = min(piece.end, piece.file.direct_end)
    if piece.end > body:
        direct.append(piece.part(max(body, piece.offset), piece.end))
    if piece.offset >= body:
        return
    first, last = -(-piece.offset // ALIGNMENT) * ALIGNMENT, body // ALIGNMENT * ALIGNMENT
    at = piece.offset
    if congruent and ((first == at and last == body) or last - first > BOUNCE_BYTES):
        if at < first:
            small.append(piece.part(at, first))
        direct.append(piece.part(first, last))
        at = last
    while at < body:
        end = min(body, at // ALIGNMENT * ALIGNMENT + BOUNCE_BYTES)
        small.append(piece.part(at, end))
        at = end


def _groups(small: list[_Piece]) -> Iterator[list[_Piece]]:
    """Group pieces in the same or neighbouring blocks, as far as one bounce buffer holds them."""
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
        file.transfer_blocks(begin, buffer[: end - begin], writing=False)
        for piece in group:
            piece.view[:] = buffer[piece.offset - begin : piece.end - begin]


def _write_group(group: list[_Piece]) -> None:
    """Write whole blocks; those that the group covers only partly are locked and read first."""
    file, (begin, end) = group[0].file, _bounds(group)
    runs = list(_uncovered(group, begin, end))
    blocks = {block for low, high in runs for block in range(low, high, ALIGNMENT)}
    with file.pool.bounce() as buffer, file.blocks_held(blocks):
        for low, high in runs:
            file.transfer_blocks(low, buffer[low - begin : high - begin], writing=False)
        for piece in group:
            buffer[piece.offset - begin : piece.end - begin] = piece.view
        file.transfer_blocks(begin, buffer[: end - begin], writing=True)


def _uncovered(group: list[_Piece], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of blocks that the pieces, sorted by offset, do not fill."""
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
