"""Finished trials on disk, one JSON line each, so that a killed comparison loses the trial in flight only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from engine.errors import storage_errors


class TrialJournal:
    """Records by key. A line that a kill cut short is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Raises:
            StorageError: if it cannot be read or written.
        """
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        with storage_errors(path), path.open("rb+") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    break
                end += len(line)
                try:
                    entry = json.loads(line)
                    self.records[entry["key"]] = entry["record"]
                except (ValueError, KeyError, TypeError):
                    continue

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Append a record and have it on disk.

        Raises:
            StorageError: if it cannot be written.
        """
        with storage_errors(self.path, "write"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps({"key": key, "record": record}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self.records[key] = record
