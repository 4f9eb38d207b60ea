"""Digests of weight files: a file is read whole, and not again for as long as it has not been touched.

A file's digest is the SHA-256 of the SHA-256 of each of its `CHUNK` bytes, so that several threads keep up
with the disk. It is kept in a small file of its own, with the path, size, inode and both times of the weight
file. Writing to a file changes its ctime, which no program can set back.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.errors import CheckpointError, StorageError, storage_errors
from engine.files.documents import parse_json, read_bytes
from engine.files.whole import write_whole
from engine.units import GIB, MIB, format_bytes, format_seconds

CHUNK = 8 * MIB

KEPT_FROM = 64 * MIB
"""Bytes of a file from which its digest is kept; a smaller one is read in a moment."""

SETTLED_SECONDS = 2.0
"""How long a file has to have been untouched for its digest to be kept: a second write within one tick of the
file system's clock would leave its times as they are."""

DROP_BEYOND = 1 * GIB
"""Bytes: what is read from a longer file does not stay in the page cache."""

_SETTINGS = ("quantize_config.json", "quant_config.json")
"""Files beside ``config.json`` that say how weights are kept in few bits."""

_THREADS = 4
_SAY_FROM = 1 * GIB
_SAY_EVERY = 10.0


class FileState(NamedTuple):
    """What changes when a file is written to."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Of a file as it is now; raises OSError."""
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    @property
    def settled(self) -> bool:
        """Whether it has not been touched for `SETTLED_SECONDS`."""
        return time.time() - max(self.mtime_ns, self.ctime_ns) / 1e9 > SETTLED_SECONDS


@dataclass(frozen=True)
class KeptDigests:
    """A folder of digests of files that have been read before."""

    folder: Path
    trusted: bool = True
    """Whether a file that has not been touched is taken to be what it was; else it is read."""

    def find(self, path: Path, state: FileState) -> str:
        """The digest of a file in that state; empty if it is not known."""
        if not self.trusted:
            return ""
        try:
            kept = parse_json(read_bytes(self._file(path), MIB), surrogates=True)
            found, digest = kept["state"], kept["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        same = found == list(state) and kept["path"] == str(path.resolve())
        return digest if same and isinstance(digest, str) and len(digest) == 64 else ""

    def keep(self, path: Path, state: FileState, digest: str) -> None:
        """Keep the digest of a large, settled file, if possible: to read it again only costs time."""
        if state.size < KEPT_FROM or not state.settled:
            return
        content = {"path": str(path.resolve()), "state": list(state), "sha256": digest}
        with suppress(OSError, StorageError):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_whole(self._file(path), json.dumps(content))

    def _file(self, path: Path) -> Path:
        return self.folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"


def digest_of(
    folder: Path,
    files: Sequence[Path],
    kept: KeptDigests | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> str:
    """Identify a model by its settings, its own code and the whole of its weights.

    Args:
        kept: digests of large files that need not be read again; None reads all.
        on_notice: called with a line when reading takes long.

    Raises:
        CheckpointError: if a file changes while it is read.
        StorageError: if one cannot be read.
    """
    digest = hashlib.sha256()
    settings = [path for name in _SETTINGS if (path := folder / name).is_file()]
    for path in [folder / "config.json", *settings, *sorted(folder.glob("*.py"))]:
        with storage_errors(path, "read"):
            digest.update(f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    states = {}
    for path in files:
        with storage_errors(path, "read"):
            states[path] = FileState.of(path)
    known = {path: kept.find(path, state) if kept else "" for path, state in states.items()}
    reading = _Reading(sum(states[path].size for path in files if not known[path]), on_notice)
    for path, state in states.items():
        found = known[path] or reading.digest(path)
        with storage_errors(path, "read"):
            touched = FileState.of(path) != state
        if touched:
            raise CheckpointError(f"{path} was changed while it was read: wait until it is complete")
        if kept and not known[path]:
            kept.keep(path, state, found)
        digest.update(f"{path.name}:{state.size}:{found}\n".encode())
    return f"sha256:{digest.hexdigest()}"


class _Reading:
    """Reads files for their digests and says how far it is."""

    def __init__(self, total: int, on_notice: Callable[[str], None] | None) -> None:
        self._total, self._done = total, 0
        self._say = on_notice if total >= _SAY_FROM else None
        self._began = self._said = time.monotonic()
        self._buffers = threading.local()
        if self._say:
            self._say(f"reading weights to identify them, {format_bytes(total)}; once, until they change")

    def digest(self, path: Path) -> str:
        """Of one file."""
        whole = hashlib.sha256()
        with storage_errors(path, "read"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                size = os.fstat(descriptor).st_size
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                with ThreadPoolExecutor(_THREADS, thread_name_prefix="digest") as threads:
                    begins = range(0, size, CHUNK)
                    for part in threads.map(lambda begin: self._chunk(descriptor, begin, size), begins):
                        whole.update(part)
            finally:
                os.close(descriptor)
        return whole.hexdigest()

    def _chunk(self, descriptor: int, begin: int, size: int) -> bytes:
        """Digest of one chunk; of a large file it does not stay in the page cache."""
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(bytearray(min(CHUNK, size)))
        view, count = self._buffers.view[: min(CHUNK, size - begin)], 0
        while count < len(view):
            step = os.preadv(descriptor, [view[count:]], begin + count)
            if not step:
                break  # it became shorter, which the comparison of its state finds
            count += step
        if size > DROP_BEYOND:
            os.posix_fadvise(descriptor, begin, count, os.POSIX_FADV_DONTNEED)
        self._tell(count)
        return hashlib.sha256(view[:count]).digest()

    def _tell(self, count: int) -> None:
        self._done += count  # of several threads: a lost count only makes a line less exact
        now = time.monotonic()
        if self._say and now - self._said > _SAY_EVERY:
            self._said = now
            left = (now - self._began) * (self._total - self._done) / self._done
            read = f"{format_bytes(self._done)} of {format_bytes(self._total)}"
            self._say(f"reading weights to identify them, {read}, {format_seconds(left)} left")
