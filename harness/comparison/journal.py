"""Finished trials on disk, one JSON line each, so that a killed comparison loses the trial in flight only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.files import JsonLines


class TrialJournal:
    """Records by key, those read at the start and those added since."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            StorageError: if it cannot be read or written.
        """
        self.records: dict[str, dict[str, Any]] = {}
        self._lines = JsonLines(path)
        self._lines.read(lambda entry: self.records.update({entry["key"]: entry["record"]}))

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Append a record and have it on disk.

        Raises:
            StorageError: if it cannot be written.
        """
        self._lines.add({"key": key, "record": record})
        self.records[key] = record
