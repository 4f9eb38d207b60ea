"""Files that are written whole or not at all, and a checksum that tells whether JSON is what was written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import storage_errors

CHECKSUM = "crc32"
"""Last key of a sealed JSON object: the CRC-32 of the object without it, in compact JSON."""


def is_stream(path: Path) -> bool:
    """Whether a path is a device, a pipe or a descriptor of this process: written to, never replaced."""
    if os.path.abspath(path).startswith(("/dev/fd/", "/dev/std", "/proc/")):
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def write_whole(path: Path, content: str | bytes, elsewhere: str = "") -> None:
    """Write a file, text as UTF-8, so that neither a kill nor a power failure leaves a half of it.

    A stream is written to as it is, see `is_stream`.

    Args:
        elsewhere: how the user chooses another path.

    Raises:
        StorageError: if it cannot be written; what was there before stays.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with storage_errors(path, "write", elsewhere):
        if is_stream(path):
            with path.open("ab") as stream:
                stream.write(data)
            return
        path = Path(os.path.realpath(path))  # a link stays
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with _alone(temporary) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)  # the space it takes may be what is missing
                raise
        with contextlib.suppress(OSError):  # some file systems cannot do this with folders
            sync_folder(path.parent)


def _alone(temporary: Path) -> BinaryIO:
    """Open a file that no other process writes meanwhile, and empty what a killed one left in it."""
    while True:
        file = temporary.open("ab")
        with contextlib.suppress(OSError):  # a file system without locks: one command at a time
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(temporary)):
                file.truncate(0)
                return file
        except FileNotFoundError:
            pass
        file.close()  # its writer has just given it its final name


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def compact(content: Any) -> bytes:
    """JSON without spaces, in one line."""
    return json.dumps(content, separators=(",", ":")).encode()


def checksum(data: bytes) -> str:
    """CRC-32 as eight hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its checksum as the last key."""
    return {**content, CHECKSUM: checksum(compact(content))}


def unsealed(content: Any) -> Any:
    """What `sealed` was given, however it is formatted now; anything without a checksum as it is.

    Raises:
        ValueError: if the content is not what was sealed.
    """
    if not isinstance(content, dict) or CHECKSUM not in content:
        return content
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    if content[CHECKSUM] != checksum(compact(rest)):
        raise ValueError("its content does not match its checksum")
    return rest
