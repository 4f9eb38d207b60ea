"""Every error the program raises on purpose.

    TierbenchError
    ├── UsageError               the input has to change (exit code 2)
    │   ├── PolicyError          a policy that is malformed or contradicts itself
    │   ├── RequestError         a request the model cannot take
    │   ├── ProfileError         a description of hardware that is malformed or impossible
    │   ├── DocumentError        a JSON or YAML text that is refused (in `engine.files.documents`)
    │   ├── InfeasibleError      no policy fits the budgets and the constraints
    │   ├── ModelError           a model that cannot be used
    │   │   ├── CheckpointError        its files are missing, damaged or do not fit its config
    │   │   └── UnsupportedModelError  its architecture is not one the engine answers correctly
    │   ├── DamagedFileError     a file is not what was written: it has to be made again
    │   └── BudgetError          a tier would need more bytes than its budget
    ├── StorageError             a tier failed while in use: disk full, I/O error (exit code 1)
    │   ├── OutOfMemoryError     the system gave the process no more memory
    │   └── DamagedEntryError    an entry of the packed store is incomplete or was changed
    └── ScheduleError            a schedule that the verifier refuses: a bug of ours (exit code 1)

A message is one line: the value, the limit it breaks, and the cure.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.units import format_bytes

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

DISK_FAILURES = (*_NO_SPACE, errno.EROFS, errno.EIO)
"""Codes that no network and no wrong name have: the disk is full, read-only or broken."""

_WRONG_PATH = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


class TierbenchError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback."""

    exit_code = 1


class UsageError(TierbenchError):
    """The input has to change before the same command can succeed."""

    exit_code = 2


class PolicyError(UsageError):
    """A policy is malformed: unknown key, fractions that do not sum to 1, impossible value."""


class RequestError(UsageError):
    """A request does not fit the model: empty prompt, unknown token id, too many positions."""


class ProfileError(UsageError):
    """A hardware profile is malformed, of another version, or has an impossible value."""


class InfeasibleError(UsageError):
    """No policy fits the budgets and the constraints.

    Attributes:
        binding: which constraint leaves none, for instance "host memory".
    """

    def __init__(self, binding: str, message: str) -> None:
        self.binding = binding
        super().__init__(message)


class ModelError(UsageError):
    """A model cannot be used."""


class CheckpointError(ModelError):
    """A checkpoint is missing, truncated, corrupt, or does not match its config."""


class UnsupportedModelError(ModelError):
    """The engine does not answer this architecture correctly and therefore refuses it."""


class DamagedFileError(UsageError):
    """A file that the program wrote is not what was written, and has to go before it is made again."""


class BudgetError(UsageError):
    """A tier's budget is smaller than the bytes it would need.

    Attributes:
        tier: name of the tier ("device", "host" or "disk").
        needed: bytes at the same time.
        available: bytes of the budget.
    """

    def __init__(self, tier: str, needed: int, available: int, what: str, cure: str) -> None:
        self.tier, self.needed, self.available = tier, needed, available
        super().__init__(
            f"{what} needs {format_bytes(needed)} ({needed:,} bytes) in the {tier} tier, which has "
            f"{format_bytes(available)} ({available:,} bytes): {cure}"
        )


class StorageError(TierbenchError):
    """A tier failed while it was in use, for instance because the disk is full."""


class OutOfMemoryError(StorageError):
    """The system gave the process no more memory, although it seemed to have it."""


class DamagedEntryError(StorageError):
    """An entry of the packed store is truncated, changed or incomplete.

    Attributes:
        identity: distinguishes this folder from one that is written in its place.
    """

    def __init__(self, message: str, identity: tuple[int, int] = (0, 0)) -> None:
        self.identity = identity
        super().__init__(message)


class ScheduleError(TierbenchError):
    """A schedule uses data before it is loaded, frees it too early, or exceeds a buffer."""


@contextlib.contextmanager
def storage_errors(
    path: Path, action: str = "use", elsewhere: str = "", free: str = "free space"
) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` of one line: action, path, reason and cure.

    Args:
        action: what is being done to the path, for instance ``read``.
        elsewhere: how the user chooses another path; part of every cure.
        free: how the user makes space on a full disk.

    Raises:
        StorageError: for every OSError.
    """
    try:
        yield
    except OSError as error:
        limit, cure = "", "check the disk"
        if error.errno in _NO_SPACE:
            limit, cure = _free_space(path), free
        elif error.errno in _WRONG_PATH:
            cure = "check the path and its permissions"
        elif error.errno == errno.EMFILE:
            cure = "raise the limit of open files (ulimit -n) or lower the block"
        cure += f" or {elsewhere}" if elsewhere else ""
        reason = error.strerror or str(error)
        raise StorageError(f"cannot {action} {path}{limit}: {reason}: {cure}") from error


def _free_space(path: Path) -> str:
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            found = os.statvfs(folder)
            return f", where {format_bytes(found.f_bavail * found.f_frsize)} are free"
    return ""


_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
_UNSAFE_ADVICE = re.compile(
    r"weights_only|allow_pickle|trust_remote_code|trust the source|trusted source", re.I
)
_LONGEST = 200


INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories of control and format characters, some of which turn the direction of all text after them,
lone surrogates, and code points without a meaning."""

_JOINERS = "\u200c\u200d"  # format characters that Persian, Indic scripts and emoji are written with


def visible(text: str) -> str:
    """The text with every character that is not simply visible replaced by U+FFFD."""
    return "".join(
        char if char in _JOINERS or unicodedata.category(char) not in INVISIBLE else "\ufffd" for char in text
    )


def printable(text: str) -> str:
    """A text on one line without escape sequences or other characters that steer a terminal."""
    return visible(" ".join(_ESCAPE.sub("", text).split()))


_LACKING = ("not enough memory", "allocate memory", "bad_alloc", "start new thread", "failed to map segment")
"""In the messages of torch's allocator, the C library, C++, Python's threads and the loader of libraries."""


def raise_if_memory(error: BaseException) -> None:
    """For those who give an error of others another meaning, before they do.

    Raises:
        OutOfMemoryError: if the error says that memory is lacking.
    """
    if isinstance(error, OutOfMemoryError):
        raise error
    if isinstance(error, TierbenchError):
        return
    if isinstance(error, OSError) and error.errno is not None:
        lacks = error.errno == errno.ENOMEM
    else:
        lacks = isinstance(error, MemoryError) or any(words in str(error) for words in _LACKING)
    if lacks:
        raise OutOfMemoryError(f"the process was given no more memory: {_MORE_MEMORY}") from error


_MORE_MEMORY = "lower the block (device_batch, num_device_batches) or --host-memory, or raise the limit"


def first_line(error: BaseException) -> str:
    """What a library's error says, to be quoted in ours: its first line, printable and shortened.

    Sentences that advise to load what is not trusted are left out. An error without a text is its type.
    """
    raise_if_memory(error)
    for line in _ESCAPE.sub("", str(error)).splitlines():
        sentences = re.split(r"(?<=[.!?;])\s+", line.strip())
        kept = printable(" ".join(one for one in sentences if not _UNSAFE_ADVICE.search(one)))
        if kept:
            return kept if len(kept) <= _LONGEST else f"{kept[:_LONGEST]}..."
    return type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint to put behind an unknown word: `` (did you mean 'resident'?)``; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
