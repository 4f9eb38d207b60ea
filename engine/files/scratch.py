"""Folders for what a process needs while it lives: marked as ours, locked, removed when it ends.

    PARENT/run-TOKEN/tierbench.json     the mark: tool, owner, token, and of whose process it is
    PARENT/.tierbench-TOKEN/            one that is being made; it gets its name once it is marked

A process keeps the mark locked for as long as it lives, and the system ends the lock with the process. So a
folder is removed only if its mark is ours, names the folder it is in, and can be locked. Whatever else lies
in the parent is its owner's, who may have chosen any folder for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from engine.files.documents import DocumentError, parse_json

_MARK = "tierbench.json"
_TOOL = "tierbench"
_BEGUN, _READY = ".tierbench-", "run-"
_NAME = re.compile(rf"(?:{re.escape(_BEGUN)}|{_READY})([0-9a-f]{{16}})")
_MOST_BYTES = 4096
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Scratch:
    """A folder of this process; a context manager that removes it.

    Attributes:
        path: the folder.
    """

    def __init__(self, parent: Path) -> None:
        """Make the folder, and its parent where there is none; folders of dead processes are removed.

        Raises:
            OSError: if it cannot be made.
        """
        parent.mkdir(parents=True, exist_ok=True)
        with _guard(parent) as is_safe:
            if is_safe:
                _sweep(parent)
            self.path, self._lock = _claim(parent)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def sweep(parent: Path) -> None:
    """Remove the folders of dead processes; whatever cannot be removed or judged stays."""
    with contextlib.suppress(OSError):
        if any(_NAME.fullmatch(name) for name in os.listdir(parent)):
            with _guard(parent) as is_safe:
                if is_safe:
                    _sweep(parent)


@contextlib.contextmanager
def _guard(parent: Path) -> Iterator[bool]:
    """Hold the parent alone, since a folder whose mark is not locked yet must not look dead.

    Yields:
        Whether that was possible: some file systems have no locks.
    """
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_safe = True
        except OSError:
            is_safe = False
        yield is_safe
    finally:
        os.close(descriptor)


def _claim(parent: Path) -> tuple[Path, int]:
    token = secrets.token_hex(8)
    begun, ready = parent / f"{_BEGUN}{token}", parent / f"{_READY}{token}"
    begun.mkdir(mode=0o700)
    descriptor = -1
    try:
        descriptor = os.open(begun / _MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mark = {"tool": _TOOL, "owner": os.getuid(), "token": token, "process": os.getpid(), "boot": _boot()}
        os.write(descriptor, json.dumps(mark).encode())
        begun.rename(ready)
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)
        raise
    return ready, descriptor


def _boot() -> str:
    """Since when the process numbers count; empty where the system does not say."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _sweep(parent: Path) -> None:
    """Remove the folders of dead processes; the parent is held."""
    for folder in sorted(parent.iterdir()):
        name = _NAME.fullmatch(folder.name)
        if name is None:
            continue
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            if folder.name.startswith(_BEGUN):
                _remove_begun(folder)
            else:
                _remove_dead(folder, name[1])


def _remove_begun(folder: Path) -> None:
    """Remove one that was never finished, so that it holds its mark at most; raises OSError for any other."""
    if os.listdir(folder) == [_MARK]:
        (folder / _MARK).unlink()
    folder.rmdir()


def _remove_dead(folder: Path, token: str) -> None:
    """Remove a folder with our mark whose process is gone; raises OSError while it lives."""
    descriptor = os.open(folder / _MARK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        try:
            mark = parse_json(os.read(descriptor, _MOST_BYTES))
        except DocumentError:
            return
        wanted = {"tool": _TOOL, "owner": os.getuid(), "token": token}
        if isinstance(mark, dict) and {key: mark.get(key) for key in wanted} == wanted:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its process is alive
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
