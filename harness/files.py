"""Where a suite's results lie on disk, and how they are written: whole or not at all.

It knows names of folders and files; it does not know HELM, the engine or what the numbers mean.

    <output>/runs/<suite>/<run name>/           HELM's own files
    <output>/runs/<suite>/policies/<policy>/    manifest.json, journal.jsonl, trace.json
    <output>/runs/<suite>/table.json, table.md, helm.log
    <output>/reports/<suite>/                   the report

What is a time in HELM's files: ``request_time``, ``batch_size`` and ``batch_request_time`` of a result, and
the stats ``inference_runtime``, ``inference_denoised_runtime`` and ``batch_size``. In table.json:
``seconds`` and what is per second. Of the manifest and the journal see `harness.suite.manifest` and
`harness.suite.journal`.

All else is the same whenever a suite is run again. It is also the same when the suite was interrupted and
continued, with two exceptions. Blocks are then cut differently, so that floats are added in another order:
log-probabilities, and the stats made of them, differ in their last digits (about 1e-6 in float32; a text
could differ only where two tokens are as close as that). And "peaks" are what was really held, so that a
block that was cut differently may have held somewhat less or more. With blocks of one sequence there are no
exceptions.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import UsageError, first_line, storage_errors
from engine.files.documents import DocumentError, parse_json
from engine.files.documents import read_json as read_document
from engine.files.names import check_folder_name
from engine.files.whole import (
    CHECKSUM,
    checksum,
    compact,
    is_stream,
    sealed,
    sync_folder,
    unsealed,
    write_whole,
)

HELM_FILES = (
    "run_spec.json",
    "scenario.json",
    "scenario_state.json",
    "stats.json",
    "per_instance_stats.json",
)


class SuiteStore:
    """Paths of one suite.

    Raises:
        UsageError: if the suite's name is not that of a folder.
        StorageError: if the folder cannot be made.
    """

    def __init__(self, output_path: Path, suite: str) -> None:
        check_folder_name("suite", suite)
        self.output_path = output_path
        self.suite = suite
        self.folder = output_path / "runs" / suite
        self.staging = self.folder / ".partial"
        with storage_errors(self.folder, "make"):
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> Path:
        """What HELM and its libraries have to say."""
        return self.folder / "helm.log"

    @property
    def reports(self) -> Path:
        """Folder of the suite's report."""
        return self.output_path / "reports" / self.suite

    def run(self, run_name: str) -> Path:
        """Folder of a finished run."""
        return self.folder / run_name

    def policy(self, policy: str) -> Path:
        """Folder of a policy's manifest, journal and trace."""
        return self.folder / "policies" / policy

    def digest(self, run_name: str) -> str:
        """Of HELM's files of a run; empty if one is missing.

        Raises:
            StorageError: if one cannot be read.
        """
        return digest_of_files(self.run(run_name))

    def publish(self, run_name: str) -> str:
        """Move a run from the staging folder to its place, instead of what was there before.

        All of it is on the disk before it has its name, so that not even a power failure leaves a half.

        Returns:
            The run's `digest`.

        Raises:
            StorageError: if it cannot be moved, or HELM has not written all files.
        """
        staged, old = self.staging / run_name, self.staging / f"{run_name}.old"
        shutil.rmtree(old, ignore_errors=True)
        with storage_errors(self.run(run_name), "write"):
            for path in filter(Path.is_file, staged.iterdir()):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(staged)
            digest = digest_of_files(staged)
            if not digest:
                raise FileNotFoundError(errno.ENOENT, f"HELM did not write all of {', '.join(HELM_FILES)}")
            if self.run(run_name).exists():
                os.replace(self.run(run_name), old)
            os.replace(staged, self.run(run_name))
            sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        return digest

    def clear_staging(self) -> None:
        """Remove what an interrupted process left behind."""
        shutil.rmtree(self.staging, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the suite while results are being written.

        Raises:
            UsageError: if another process is at work on it.
            StorageError: if nothing can be written there.
        """
        path = self.folder / ".lock"
        with ExitStack() as stack:
            with storage_errors(path):
                file = stack.enter_context(path.open("wb"))
            lock(file, f"another process is running suite {self.suite!r}", "choose another --suite")
            yield


class JsonLines:
    """A file of JSON lines that is only ever appended to; each line ends in its checksum.

    Of a stream nothing is read.

    Attributes:
        damaged: lines that are not what was written, and were ignored.
    """

    def __init__(
        self, path: Path, sync_seconds: float = 0.0, elsewhere: str = "", unchecked: bool = False
    ) -> None:
        """Nothing is read or made yet.

        Args:
            sync_seconds: how much of what was added a crash of the machine may lose. With 0 the file is open
                only while an entry is written; else it is to be closed.
            elsewhere: how the user chooses another path.
            unchecked: whether lines without a checksum are taken, as earlier versions wrote them.
        """
        self.path, self.damaged, self._elsewhere = path, 0, elsewhere
        self._is_stream = is_stream(path)
        self._file: BinaryIO | None = None
        self._sync_seconds, self._synced = sync_seconds, time.monotonic()
        self._unchecked = unchecked

    def read(self, take: Callable[[Any], object]) -> None:
        """Hand over every entry; a last line that a kill cut short is cut off.

        Args:
            take: raises ValueError, KeyError or TypeError for an entry that is damaged.

        Raises:
            StorageError: if the file is there and cannot be used.
        """
        if self._is_stream or not self.path.exists():
            return
        with storage_errors(self.path), self.path.open("rb+") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(end)
                    break
                end += len(line)
                try:
                    take(read_line(line, self._unchecked))
                except (ValueError, KeyError, TypeError):
                    self.damaged += 1

    def complaint(self, cure: str) -> str:
        """One line about the damaged ones; ``cure`` says what becomes of what they held."""
        lines, they = ("line is", "it") if self.damaged == 1 else ("lines are", "they")
        return f"{self.damaged:,} damaged {lines} ignored in {self.path}: what only {they} held {cure}"

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append an entry; it survives the death of this process at once.

        Raises:
            StorageError: if it cannot be written, or somebody has removed the file meanwhile.
        """
        with storage_errors(self.path, "write", self._elsewhere):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab")
            self._file.write(json_line(entry))
            self._file.flush()
            if not self._is_stream and not os.fstat(self._file.fileno()).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "it was removed while it was being written")
            if not self._is_stream and time.monotonic() - self._synced > self._sync_seconds:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        if not self._sync_seconds:
            self.close()

    def close(self) -> None:
        """Have everything on disk."""
        if self._file is not None:
            with storage_errors(self.path, "write", self._elsewhere), self._file as file:
                self._file = None
                file.flush()
                if not self._is_stream:
                    os.fsync(file.fileno())


SEAL = re.compile(rb',"%s":"([0-9a-f]{8})"}\n' % CHECKSUM.encode())
SEAL_BYTES = len(f',"{CHECKSUM}":"00000000"}}\n')


def json_line(entry: Mapping[str, Any]) -> bytes:
    """An entry, which is not empty, as one line of JSON that ends in its checksum."""
    body = compact(entry)
    return body[:-1] + f',"{CHECKSUM}":"{checksum(body)}"}}\n'.encode()


def read_line(line: bytes, unchecked: bool = False) -> Any:
    """The entry that `json_line` was given.

    Args:
        unchecked: whether a line without a checksum is taken as it is.

    Raises:
        ValueError: if the line is not what was written.
    """
    seal = SEAL.fullmatch(line[-SEAL_BYTES:])
    if seal is None:
        content = parse_json(line, finite=False, surrogates=True)
        if unchecked and not (isinstance(content, dict) and CHECKSUM in content):
            return content
        raise ValueError("the line has no checksum")
    if seal[1].decode() != checksum(line[:-SEAL_BYTES] + b"}"):
        raise ValueError("the line does not match its checksum")
    try:
        content = json.loads(line)  # our own: what guards against other people's costs as much again
        del content[CHECKSUM]
    except (RecursionError, TypeError) as error:
        raise ValueError("the line is no object") from error
    return content


def digest_of_files(folder: Path) -> str:
    """SHA-256 of HELM's files of a run; empty if one is missing.

    Raises:
        StorageError: if one cannot be read.
    """
    digests = []
    for name in HELM_FILES:
        path = folder / name
        if not path.is_file():
            return ""
        with storage_errors(path, "read"), path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digest_of(digests)


def digest_of(content: Any) -> str:
    """SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def lock(file: BinaryIO, taken: str, elsewhere: str) -> None:
    """Keep other processes away from a file until it is closed.

    Args:
        taken: what to say where another process has it.
        elsewhere: the cure besides waiting.

    Raises:
        UsageError: where another process has it; the file is closed then.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UsageError(f"{taken}: wait for it or {elsewhere}") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, whole or not at all."""
    write_whole(path, json.dumps(sealed(value), indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; None where there is none or it is damaged.

    Raises:
        StorageError: if there is one that cannot be read.
    """
    try:
        with storage_errors(path):
            return unsealed(read_document(path, finite=False, surrogates=True)) if path.exists() else None
    except ValueError:  # refused, or not what was written
        return None


def require_json(path: Path) -> Any:
    """Read a JSON file of a suite that has to be there.

    Raises:
        UsageError: if it is missing or damaged.
    """
    try:
        return unsealed(read_document(path, finite=False, surrogates=True))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: run the suite again") from None
    except DocumentError as error:
        raise UsageError(f"{path} is damaged (it {error}): run the suite again") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): run the suite again") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({first_line(error)}): run the suite again") from error
