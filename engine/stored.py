"""Interface to the packed store for listing, verifying and clearing it: entries by key, no tensors.

Also the digest of a checkpoint for those that make other files of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.errors import DamagedEntryError, UsageError
from engine.memory.store.packed import EntryStatus as EntryStatus
from engine.memory.store.packed import PackedStore
from engine.models.digests import KeptDigests, digest_of


class ModelStore(PackedStore):
    """The packed store as a user asks for its entries."""

    def chosen(self, beginnings: Sequence[str]) -> list[EntryStatus]:
        """The entries with these beginnings of their keys, one entry per beginning.

        Raises:
            UsageError: for a beginning that no key has, or more than one.
        """
        known, found = self.entries(), {}
        for beginning in beginnings:
            fitting = [entry for entry in known if entry.key.startswith(beginning)]
            if len(fitting) != 1 or not beginning:
                raise UsageError(
                    f"{beginning!r} begins {len(fitting)} keys of {self.root}, which has {len(known)} "
                    "entries: give one key, as run_helm.py store list shows them"
                )
            found[fitting[0].key] = fitting[0]
        return list(found.values())

    def verify(self, entries: Sequence[EntryStatus]) -> Iterator[tuple[EntryStatus, str]]:
        """Read entries completely; yields each with what is wrong with it, empty if nothing is.

        Raises:
            StorageError: if the disk cannot be read.
        """
        for status in entries:
            try:
                entry = self.open(status.key, verify=True)
                if entry is not None:
                    entry.close()
                yield status, "it was removed meanwhile" if entry is None else ""
            except DamagedEntryError as error:
                yield status, str(error)


def checkpoint_digest(
    folder: Path, files: Sequence[Path], on_notice: Callable[[str], None] | None = None
) -> str:
    """Identifies a checkpoint by its config and the whole of its weight files.

    Args:
        on_notice: called with a line when reading takes long.

    Raises:
        CheckpointError: if a file changes while it is read.
        StorageError: if one cannot be read.
    """
    return digest_of(folder, files, KeptDigests(PackedStore().digests), on_notice)
