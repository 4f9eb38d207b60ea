"""The result file of a batch: appended to line by line, continued after a kill, owned by one job.

It knows which lines are answers, whose they are and whether they are whole; it does not know what is
in them, nor the engine. Whose answers are there is kept in a temporary data base on disk, so that
memory does not grow with the file.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from engine.errors import UsageError, storage_errors
from harness.files import SEAL, SEAL_BYTES, JsonLines, lock, read_line
from harness.identity import Identity, since
from harness.openai_batch.fields import LineError
from harness.openai_batch.response import RECORD_PREFIX, changed_parts

_SYNC_SECONDS = 1.0
_CACHE_KIB = 16 << 10
_BEGINNING = b'{"id":"' + RECORD_PREFIX.encode()
_ELSEWHERE = "choose another --output"


class AskedLine:
    """Which custom ids were answered before and which have been read from the input.

    Attributes:
        fingerprints: the different ones of the answers that are there.
        about: what this job's answers depend on besides their lines.
    """

    about: Identity | None = None

    def __init__(self) -> None:
        self.fingerprints: dict[str, None] = {}
        self._base = sqlite3.connect("", isolation_level=None)  # a file of its own that goes away with it
        self._base.execute("PRAGMA journal_mode=OFF")
        columns = "id BLOB PRIMARY KEY, record TEXT, line INTEGER"
        self._base.execute(f"CREATE TABLE asked ({columns}) WITHOUT ROWID")
        self._base.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        self._base.execute("BEGIN")
        self._answered = False

    def close(self) -> None:
        """Delete the data base."""
        self._base.close()

    def remember(self, custom_id: str, record: str, fingerprint: str = "") -> None:
        """Note that the result file holds an answer."""
        self.fingerprints[fingerprint] = None
        self._answered, row = True, (_blob(custom_id), record)
        self._base.execute("INSERT OR IGNORE INTO asked VALUES (?, ?, NULL)", row)

    def claim(self, custom_id: str, record: str, line: int) -> bool:
        """Whether this line of the input still has to be answered.

        Args:
            record: id of the record that its answer would have.

        Raises:
            LineError: if an earlier line has the same custom id.
            UsageError: if the answer that is there is another request's, model's or seed's.
        """
        key = _blob(custom_id)
        if self._answered:
            known = "UPDATE asked SET line = ? WHERE id = ? AND record = ? AND line IS NULL"
            if self._base.execute(known, (line, key, record)).rowcount:
                return False
        added = self._base.execute("INSERT OR IGNORE INTO asked VALUES (?, ?, ?)", (key, record, line))
        if added.rowcount:
            return True
        (first,) = self._base.execute("SELECT line FROM asked WHERE id = ?", (key,)).fetchone()
        if first is not None:
            raise LineError(
                f"custom_id {custom_id!r} is that of line {first} already",
                code="duplicate_custom_id", param="custom_id", custom_id=custom_id,
            )  # fmt: skip
        raise UsageError(
            f"the output holds an answer to custom_id {custom_id!r} that is not this one's"
            f"{self._changed() or f': line {line} of the input was another'}; choose another --output"
        )

    def _changed(self) -> str:
        """What of the job was another one when the answers were given; empty if only requests were."""
        for shown in self.fingerprints:
            if self.about and (changed := changed_parts(self.about, shown)):
                return since(changed)
        return ""


class ResultFile(JsonLines):
    """Appends records to a file that no other job writes to meanwhile; to be closed.

    Opening reads what an earlier job left: answers stay, a torn last line and damaged ones go, and so do
    error records, since their requests are tried again. A stream is written to and
    holds nothing.
    """

    def __init__(self, path: Path, asked: AskedLine) -> None:
        """Open or make the file.

        Raises:
            UsageError: if another job has it, or it holds anything but batch results.
            StorageError: if it cannot be read or written.
        """
        super().__init__(path, _SYNC_SECONDS, _ELSEWHERE, unchecked=True)
        self._partial = path.with_name(f".{path.name}.partial")
        with storage_errors(path, "write", _ELSEWHERE):
            if self._is_stream:
                self._file = path.open("ab")
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            file = self._locked()
            try:
                self._partial.unlink(missing_ok=True)  # of a killed job
                self._file = self._with_answers_only(file, asked)
            except BaseException:
                file.close()
                raise

    def _locked(self) -> BinaryIO:
        while True:
            file = self.path.open("ab")
            self._lock(file)
            if os.path.exists(self.path) and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                return file
            file.close()  # another job replaced the file between opening and locking

    def _lock(self, file: BinaryIO) -> None:
        lock(file, f"another job is writing to {self.path}", _ELSEWHERE)

    def _with_answers_only(self, file: BinaryIO, asked: AskedLine) -> BinaryIO:
        """Remember the answers; if there is anything else, replace the file by one that holds them alone."""
        with self.path.open("rb") as old:
            dropped = sum(not kept for _, kept in self._lines(old, asked))
        if not dropped:
            return file
        with self.path.open("rb") as old:
            new = self._partial.open("wb")
            try:
                self._lock(new)
                new.writelines(line for line, kept in self._lines(old, None) if kept)
                new.flush()
                os.fsync(new.fileno())
                os.replace(self._partial, self.path)
            except BaseException:
                self._partial.unlink(missing_ok=True)
                new.close()
                raise
        file.close()
        return new

    def _lines(self, old: BinaryIO, asked: AskedLine | None) -> Iterator[tuple[bytes, bool]]:
        """Each line and whether it is a whole answer; damaged ones are counted if answers are remembered."""
        for number, line in enumerate(old, start=1):
            if not line.endswith(b"\n") and (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                yield line, False
                return
            try:
                record = read_line(line, unchecked=True)
                custom_id, name, error = record["custom_id"], record["id"], record["error"]
                known = record["response"]["status_code"] < 400 and isinstance(custom_id, str)
                known = known and isinstance(name, str) and name.isascii()  # as ours are
            except (ValueError, KeyError, TypeError):
                if not (line.startswith(_BEGINNING) or SEAL.fullmatch(line[-SEAL_BYTES:])):
                    raise UsageError(
                        f"line {number} of {self.path} is not a batch result: {_ELSEWHERE}"
                    ) from None
                self.damaged += asked is not None
                yield line, False
                continue
            kept = error is None and known
            if kept and asked is not None:
                body = record["response"].get("body")
                shown = body.get("system_fingerprint") if isinstance(body, dict) else ""
                asked.remember(custom_id, name, str(shown or ""))
            yield line, kept


def _blob(custom_id: str) -> bytes:
    # a digest: of one size, and of texts that UTF-8 cannot hold too
    return hashlib.sha256(custom_id.encode(errors="surrogatepass")).digest()[:16]
