"""The packed store: weights in the formats of a run, made once from a checkpoint and used by all later runs.

    ROOT/KEY/weights.bin     every tensor at a multiple of 4096, in the order of the model's stages
    ROOT/KEY/index.json      names, offsets, checksums and origin of the tensors
    ROOT/writing-KEY/        an entry that is being written; renamed when complete
    ROOT/digests/            of checkpoints' files, so that they are read once: `engine.models.digests`

Locks (flock, which end with their process) are on ``weights.bin``: shared while an entry is used, exclusive
while it is written. A ``writing-`` folder that can be locked therefore belongs to a killed process. The root
is locked only while folders are created, renamed or removed. Knows no policy and no placement.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import DamagedEntryError, StorageError
from engine.files.whole import sync_folder
from engine.memory.store.index import KEY_DIGITS, About, Index, StoredTensor
from engine.memory.store.pieces import VARIABLE, chosen_pieces, damaged_part, store_errors
from engine.memory.store.writer import INDEX, WEIGHTS, Writer
from engine.spec.extent import Extent
from engine.units import format_bytes

if TYPE_CHECKING:
    from typing import Self

_WRITING, _GONE = "writing-", "gone-"
_NO_WEIGHTS = f"it has no {WEIGHTS}"
_KEY = re.compile(rf"[0-9a-f]{{{KEY_DIGITS}}}")
_LEFT = re.compile(rf"{_WRITING}{_KEY.pattern}|{_GONE}{_KEY.pattern}-\d+-\d+")
"""Names of folders that a killed process leaves; what else lies in the root is its owner's."""

OnNotice = Callable[[str], None]
"""Called with one line for a user who waits."""


def default_root() -> Path:
    """``$TIERBENCH_STORE``, else ``tierbench/store`` in the user's cache."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tierbench" / "store"


class StoreEntry:
    """An entry in use: it cannot be removed until it is closed. A context manager.

    Attributes:
        key: its name in the store.
        index: names, offsets and checksums of its tensors.
        path: the weights' file.
    """

    def __init__(self, key: str, path: Path, index: Index, file: FileIO, identity: tuple[int, int]) -> None:
        self.key, self.path, self.index = key, path, index
        self._file, self._identity = file, identity

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def extent(self, name: str) -> Extent:
        """Where the bytes of a tensor are; raises KeyError if the entry does not have it."""
        placed = self.index.tensors[name]
        return Extent(self.path, placed.offset, placed.tensor.nbytes)

    def verify(self) -> None:
        """Read everything from the disk and compare checksums.

        Raises:
            DamagedEntryError: naming the first tensor that differs.
            StorageError: if the disk cannot be read.
        """
        self._compare(None)

    def spot_check(self) -> None:
        """Compare the checksums of a few pieces at random, see `chosen_pieces`.

        Raises:
            DamagedEntryError: naming the first tensor that differs.
            StorageError: if the disk cannot be read.
        """
        if chosen := chosen_pieces(self.index.tensors):
            self._compare(chosen)

    def _compare(self, chosen: Collection[int] | None) -> None:
        found = damaged_part(self.path, self.index.tensors, chosen)
        if found:
            raise DamagedEntryError(_damage(self.path.parent, found), self._identity)


@dataclass(frozen=True)
class EntryStatus:
    """One entry as `PackedStore.entries` finds it."""

    key: str
    nbytes: int
    """Bytes that its files take."""

    index: Index | None
    """None if it is damaged."""

    in_use: bool
    damage: str
    """What is wrong with it, in one line; empty if nothing shows without reading the weights."""

    @property
    def about(self) -> About:
        """Where it comes from; all empty if it is damaged."""
        return self.index.about if self.index else About("", "", "", "", "")

    @property
    def created(self) -> float:
        """Seconds since 1970; 0 if it is damaged."""
        return self.index.created if self.index else 0.0


class PackedStore:
    """A folder of entries, shared by processes."""

    def __init__(self, root: Path | None = None) -> None:
        """Creates nothing yet; `default_root` if no folder is given."""
        self.root = (root or default_root()).absolute()
        self.digests = self.root / "digests"
        """Folder of digests of checkpoints' files."""

    def open(self, key: str, verify: bool = False) -> StoreEntry | None:
        """An entry, or None if there is none. Lengths are always checked, checksums with ``verify``.

        Raises:
            DamagedEntryError: if it is incomplete or was changed.
            StorageError: if it cannot be read.
        """
        folder = self._folder(key)
        path = folder / WEIGHTS
        with store_errors(folder, "read"):
            identity = _identity(folder)
            if identity is None:
                return None
            try:
                file = FileIO(path)
            except FileNotFoundError:
                if identity == _identity(folder):
                    raise DamagedEntryError(_damage(folder, _NO_WEIGHTS), identity) from None
                return self.open(key, verify)  # removed or replaced meanwhile
        try:
            with store_errors(path, "lock"):
                fcntl.flock(file, fcntl.LOCK_SH)
                if identity != _identity(folder):
                    file.close()
                    return self.open(key, verify)
            index = _read_index(folder, os.fstat(file.fileno()).st_size, identity)
            entry = StoreEntry(key, path, index, file, identity)
            if verify:
                entry.verify()
            return entry
        except BaseException:
            file.close()
            raise

    def create(
        self, key: str, about: About, tensors: Sequence[StoredTensor], on_notice: OnNotice | None = None
    ) -> Writer | None:
        """Begin an entry, or wait while another process writes it: then returns None, and `open` finds it.

        Args:
            tensors: all tensors of the entry, in the order of the stages.
            on_notice: called if another process has to be waited for.

        Raises:
            StorageError: if the folder cannot be written. A full disk shows when the writer is entered.
        """
        folder = self.root / f"{_WRITING}{key}"
        while True:
            with self._guard():
                if self._folder(key).exists():
                    return None
                self._sweep()
                busy = _open_if_locked(folder / WEIGHTS)
                if busy is None:
                    shutil.rmtree(folder, ignore_errors=True)
                    with store_errors(folder, "make"):
                        folder.mkdir(mode=0o700)
                    return Writer(folder, about, tensors, partial(self._publish, folder, key))
            with busy:
                if on_notice:
                    on_notice(f"waiting for another process that writes {folder}")
                with store_errors(folder, "wait for"):
                    fcntl.flock(busy, fcntl.LOCK_SH)

    def obtain(
        self,
        key: str,
        about: About,
        tensors: Sequence[StoredTensor],
        write: Callable[[Writer], None],
        *,
        verify: bool = False,
        on_notice: OnNotice | None = None,
    ) -> StoreEntry:
        """The entry of that key: found, written by ``write``, or awaited from another process.

        A damaged one is written anew, and ``on_notice`` says so. Of one that is found, a few pieces are
        compared with their checksums, or with ``verify`` all.

        Raises:
            StorageError: if it cannot be written or read.
        """
        written = False
        while True:
            try:
                entry = self.open(key, verify and not written)
                if entry is not None:
                    with contextlib.ExitStack() as closing:
                        closing.callback(entry.close)
                        if not entry.index.holds(tensors):
                            what = "it holds other tensors than its name says"
                            raise DamagedEntryError(_damage(entry.path.parent, what), entry._identity)
                        if not (verify or written):
                            entry.spot_check()
                        closing.pop_all()
                    return entry
            except DamagedEntryError as error:
                if on_notice:
                    on_notice(f"{error}; it is made anew")
                self._discard(key, error.identity)
            writer = self.create(key, about, tensors, on_notice)
            if writer is not None:
                with writer:
                    write(writer)
                written = True  # the writer has read it back

    def entries(self) -> list[EntryStatus]:
        """All entries, the oldest first; also removes what killed processes left."""
        if not self.root.is_dir():
            return []
        found = []
        with self._guard(), store_errors(self.root, "read"):
            self._sweep()
            for folder in self.root.iterdir():
                if _KEY.fullmatch(folder.name) and folder.is_dir():
                    found.append(self._listed(folder))
        return sorted(found, key=lambda entry: (entry.created, entry.key))

    def remove(self, key: str) -> bool:
        """Delete an entry; False, and nothing is deleted, if a process uses it.

        Raises:
            StorageError: if there is no such entry, or it cannot be deleted.
        """
        with self._guard():
            self._sweep()
            folder = self._folder(key)
            if not folder.is_dir():
                raise StorageError(
                    f"{self.root} has no entry {key}: run_helm.py store list shows what it has"
                )
            if _in_use(folder):
                return False
            self._delete(folder)
        return True

    def _folder(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a key of {KEY_DIGITS} hexadecimal digits")
        return self.root / key

    def _publish(self, folder: Path, key: str) -> None:
        """Give a complete entry its final name, atomically and durably."""
        with self._guard(), store_errors(folder, "rename"):
            folder.rename(self._folder(key))
            sync_folder(self.root)

    def _discard(self, key: str, identity: tuple[int, int]) -> None:
        """Delete a damaged entry, unless another process has already put a new one in its place."""
        with self._guard():
            if _identity(self._folder(key)) == identity:
                self._delete(self._folder(key))

    def _delete(self, folder: Path) -> None:
        """Rename first, so that no partial entry is ever visible; processes that have it open keep it."""
        gone = self.root / f"{_GONE}{folder.name}-{os.getpid()}-{time.time_ns()}"
        with store_errors(folder, "remove"):
            folder.rename(gone)
            shutil.rmtree(gone)

    def _sweep(self) -> None:
        """Remove what killed processes left; the root is locked."""
        for folder in self.root.iterdir():
            if _LEFT.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                ours = set(os.listdir(folder)) <= {WEIGHTS, INDEX}
                if ours and not _in_use(folder):
                    shutil.rmtree(folder, ignore_errors=True)

    def _listed(self, folder: Path) -> EntryStatus:
        nbytes = sum(path.stat().st_size for path in folder.iterdir())
        index, damage = None, ""
        try:
            index = _read_index(folder, (folder / WEIGHTS).stat().st_size, (0, 0))
        except FileNotFoundError:
            damage = _damage(folder, _NO_WEIGHTS)
        except StorageError as error:
            damage = str(error)
        return EntryStatus(folder.name, nbytes, index, _in_use(folder), damage)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Hold the root alone, among processes and threads; for moments only."""
        with store_errors(self.root, "use the store's folder"):
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with store_errors(self.root, "lock"):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _read_index(folder: Path, length: int, identity: tuple[int, int]) -> Index:
    """The index of an entry whose weights' file has that length."""
    with store_errors(folder / INDEX, "read"):
        try:
            index = Index.from_json((folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DamagedEntryError(_damage(folder, f"it has no {INDEX}"), identity) from None
        except ValueError as error:
            raise DamagedEntryError(_damage(folder, f"{INDEX}: {error}"), identity) from error
    if length != index.nbytes:
        what = f"{WEIGHTS} has {length:,} bytes instead of {index.nbytes:,} ({format_bytes(index.nbytes)})"
        raise DamagedEntryError(_damage(folder, what), identity)
    return index


def _damage(folder: Path, what: str) -> str:
    return f"entry {folder} is damaged: {what}: remove it with run_helm.py store remove {folder.name}"


def _identity(folder: Path) -> tuple[int, int] | None:
    """Distinguishes a folder from a later one of the same name; None if there is none."""
    try:
        status = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns


def _in_use(folder: Path) -> bool:
    """Whether a process reads or writes an entry; the root must be locked."""
    file = _open_if_locked(folder / WEIGHTS)
    if file is not None:
        file.close()
    return file is not None


def _open_if_locked(path: Path) -> FileIO | None:
    """The file, if it exists and another process has locked it."""
    try:
        file = FileIO(path)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return file
    file.close()
    return None
