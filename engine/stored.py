"""Interface to the packed store for listing, verifying and clearing it: entries by key, no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import DamagedEntryError, UsageError
from engine.memory.store.packed import EntryStatus, PackedStore
from engine.memory.store.pieces import VARIABLE as VARIABLE


@dataclass(frozen=True)
class StoredModel:
    """One entry of the store."""

    key: str
    nbytes: int
    """Bytes on the disk."""

    model: str
    """Folder or hub name as it was given; empty if the entry is damaged."""

    architecture: str
    weights: str
    """``trained`` or ``random``."""

    formats: str
    """Format of the weights, as a policy writes it."""

    digest: str
    """Of config and weights."""

    created: float
    """Seconds since 1970; 0 if the entry is damaged."""

    in_use: bool
    damage: str
    """What is wrong with it, in one line; empty if nothing shows without reading the weights."""


class ModelStore:
    """The models in a packed store."""

    def __init__(self, folder: Path | None = None) -> None:
        """Use the default folder if none is given; creates nothing."""
        self._store = PackedStore(folder)

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self._store.root

    def models(self) -> list[StoredModel]:
        """All entries, the oldest first. Raises StorageError."""
        return [_model(listed) for listed in self._store.entries()]

    def chosen(self, beginnings: Sequence[str]) -> list[StoredModel]:
        """The entries with these beginnings of their keys, one entry per beginning.

        Raises:
            UsageError: for a beginning that no key has, or more than one.
        """
        known, found = self.models(), {}
        for beginning in beginnings:
            fitting = [model for model in known if model.key.startswith(beginning)]
            if len(fitting) != 1 or not beginning:
                raise UsageError(
                    f"{beginning!r} begins {len(fitting)} keys of {self.folder}, which has {len(known)} "
                    "entries: give one key, as run_helm.py store list shows them"
                )
            found[fitting[0].key] = fitting[0]
        return list(found.values())

    def remove(self, key: str) -> bool:
        """Delete an entry; False, and nothing is deleted, if a process uses it. Raises StorageError."""
        return self._store.remove(key)

    def verify(self, models: Sequence[StoredModel]) -> Iterator[tuple[StoredModel, str]]:
        """Read entries completely; yields each with what is wrong with it, empty if nothing is.

        Raises:
            StorageError: if the disk cannot be read.
        """
        for model in models:
            try:
                entry = self._store.open(model.key)
                if entry is None:
                    yield model, "it was removed meanwhile"
                    continue
                with entry:
                    entry.verify()
                yield model, ""
            except DamagedEntryError as error:
                yield model, str(error)


def _model(listed: EntryStatus) -> StoredModel:
    if listed.index is None:
        return StoredModel(listed.key, listed.nbytes, "", "", "", "", "", 0.0, listed.in_use, listed.damage)
    about = listed.index.about
    return StoredModel(
        listed.key, listed.nbytes, about.model, about.architecture, about.weights, about.formats,
        about.digest, listed.index.created, listed.in_use, listed.damage,
    )  # fmt: skip
