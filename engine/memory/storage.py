"""The three tiers: allocate on them, read and write them, and never hold more than the budget.

Device and host memory are torch tensors; the disk tier is real files in a folder of this run. Every
byte that is kept is charged to a ledger first. This module does not know what the bytes mean.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import BudgetError, StorageError, UsageError
from engine.spec.hardware import Tier
from engine.units import format_bytes


class ByteLedger:
    """Counts what every tier holds and refuses to exceed a limit; safe to use from several threads."""

    def __init__(self, limits: Mapping[Tier, int], unified: bool = False) -> None:
        """With ``unified`` device and host are one memory whose limit is the host's."""
        self.limits = dict(limits)
        self.unified = unified
        self.held = dict.fromkeys(Tier, 0)
        self.peak = dict.fromkeys(Tier, 0)
        self._lock = threading.Lock()

    def charge(self, tier: Tier, count: int, what: str) -> None:
        """Note that ``count`` more bytes are held.

        Raises:
            BudgetError: if that would exceed the tier's limit; nothing is charged then.
        """
        with self._lock:
            if self.unified and tier is not Tier.DISK:
                would_hold = self.held[Tier.DEVICE] + self.held[Tier.HOST] + count
                limited = Tier.HOST
            else:
                would_hold, limited = self.held[tier] + count, tier
            if would_hold > self.limits[limited]:
                raise BudgetError(
                    limited.value,
                    would_hold,
                    self.limits[limited],
                    what,
                    "raise the budget or lower the block",
                )
            self.held[tier] += count
            self.peak[tier] = max(self.peak[tier], self.held[tier])

    def release(self, tier: Tier, count: int) -> None:
        """Note that so many bytes are free again."""
        with self._lock:
            self.held[tier] -= count


class DiskFile:
    """A file of fixed size on the disk tier, read and written at offsets from any thread."""

    def __init__(self, path: Path, size: int) -> None:
        """Create the file with its space reserved, so that a full disk is met now and not midway.

        Raises:
            StorageError: if the disk is full or cannot be written.
        """
        self.path, self.size = path, size
        with _io(path, f"reserve {format_bytes(size)} in"):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                if size:
                    os.posix_fallocate(self._descriptor, 0, size)
            except OSError:
                self.close()
                raise

    def read(self, offset: int, into: Tensor) -> None:
        """Fill a contiguous CPU tensor with the bytes at ``offset``."""
        view = _bytes_of(into)
        done = 0
        with _io(self.path, "read"):
            while done < len(view):
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
                if not count:
                    raise StorageError(
                        f"{self.path} ends at byte {offset + done:,}: it was changed from outside"
                    )
                done += count

    def write(self, offset: int, source: Tensor) -> None:
        """Write a contiguous CPU tensor's bytes at ``offset``."""
        view = _bytes_of(source)
        done = 0
        with _io(self.path, "write"):
            while done < len(view):
                done += os.pwritev(self._descriptor, [view[done:]], offset + done)

    def close(self) -> None:
        """Close and delete the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self.path.unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data


_CURES = {
    errno.ENOSPC: "free space or choose another --offload-dir",
    errno.EDQUOT: "free space or choose another --offload-dir",
    errno.EMFILE: "lower the block, or raise the limit of open files (ulimit -n)",
}


class _io:
    """Turns the operating system's errors into one clear line."""

    def __init__(self, path: Path, action: str) -> None:
        self._path, self._action = path, action

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            cure = _CURES.get(error.errno or 0, "check the disk")
            raise StorageError(f"cannot {self._action} {self._path}: {error.strerror}: {cure}") from error


class Tiers:
    """The tiers of one run on one device.

    Attributes:
        device: what computes; its memory is the device tier.
        unified: whether device and host are one memory (a CPU without a pretend device).
        ledger: what each tier holds.
    """

    def __init__(
        self, device: torch.device, unified: bool, limits: Mapping[Tier, int], offload_dir: Path
    ) -> None:
        self.device = device
        self.unified = unified
        self.ledger = ByteLedger(limits, unified)
        self._offload_dir = offload_dir
        self._folder: Path | None = None
        self._lock_file: int = -1
        self._serial = 0
        self._held: dict[int, tuple[Tier, int]] = {}
        self._serial_of: dict[int, int] = {}  # id of a tensor or file that is held
        self._files: dict[int, DiskFile] = {}

    def mark(self) -> int:
        """A point in time for `release_since`."""
        return self._serial

    def tensor(self, tier: Tier, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
        """Allocate on the device or host tier; host memory is pinned where a device copies from it.

        Raises:
            BudgetError: if the tier's budget does not allow it.
            StorageError: if the machine does not have it.
        """
        count = torch.Size(shape).numel() * dtype.itemsize
        self.reserve(tier, count, what)
        pinned = tier is Tier.HOST and self.device.type == "cuda"
        try:
            tensor = torch.empty(
                shape, dtype=dtype, device=self.device if tier is Tier.DEVICE else "cpu", pin_memory=pinned
            )
        except (RuntimeError, MemoryError) as error:
            self._release(self._serial - 1)
            raise StorageError(
                f"{what}: the machine has no {format_bytes(count)} of {tier.value} memory left, "
                "although the budget allows it: lower the budget or the block"
            ) from error
        self._serial_of[id(tensor)] = self._serial - 1
        return tensor

    def free(self, tensor: Tensor) -> None:
        """Give back what `tensor` allocated; the caller drops its last reference."""
        self._release(self._serial_of.pop(id(tensor)))

    def file(self, size: int, what: str) -> DiskFile:
        """Create a file on the disk tier.

        Raises:
            BudgetError: if the disk budget does not allow it.
            StorageError: if the disk is full or the folder cannot be written.
        """
        self.reserve(Tier.DISK, size, what)
        serial = self._serial - 1
        try:
            file = DiskFile(self.folder / f"{serial:06d}.bin", size)
        except BaseException:
            self._release(serial)
            raise
        self._files[serial] = file
        self._serial_of[id(file)] = serial
        return file

    def free_file(self, file: DiskFile) -> None:
        """Delete a file and give back its bytes."""
        self._release(self._serial_of.pop(id(file)))

    def reserve(self, tier: Tier, count: int, what: str) -> None:
        """Charge bytes that are allocated elsewhere; given back by `release_since`.

        Raises:
            BudgetError: if the tier's budget does not allow it.
        """
        self.ledger.charge(tier, count, what)
        self._held[self._serial] = (tier, count)
        self._serial += 1

    def release_since(self, mark: int) -> None:
        """Give back everything that was taken after `mark` and not given back since, files included."""
        for serial in [serial for serial in self._held if serial >= mark]:
            self._release(serial)
        self._serial_of = {key: serial for key, serial in self._serial_of.items() if serial in self._held}

    def _release(self, serial: int) -> None:
        tier, count = self._held.pop(serial)
        self.ledger.release(tier, count)
        file = self._files.pop(serial, None)
        if file is not None:
            file.close()

    @property
    def folder(self) -> Path:
        """This run's own folder in the offload folder; made when first needed."""
        if self._folder is None:
            self._folder, self._lock_file = _claim_folder(self._offload_dir)
        return self._folder

    def close(self) -> None:
        """Give everything back and delete this run's folder."""
        self.release_since(0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock_file)
            self._folder = None


def check_offload_dir(folder: Path) -> None:
    """Fail early if the offload folder cannot be used.

    Raises:
        UsageError: naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"offload folder {folder} cannot be written ({error.strerror}): choose another --offload-dir"
        ) from error


def _claim_folder(parent: Path) -> tuple[Path, int]:
    """Make a folder for this run and remove those of runs that were killed.

    A run holds a lock on its folder for as long as it lives; a folder that can be locked is dead.
    """
    check_offload_dir(parent)
    _allow_many_files()
    guard = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)  # a folder that is not locked yet is not to be taken for dead
        return _claim_locked(parent)
    finally:
        os.close(guard)


def _allow_many_files() -> None:
    """Raise the soft limit of open files: every sequence on disk has one of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _claim_locked(parent: Path) -> tuple[Path, int]:
    for old in parent.glob("run-*"):
        try:
            descriptor = os.open(old / "lock", os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
        except OSError:
            pass  # alive
        finally:
            os.close(descriptor)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return folder, descriptor
