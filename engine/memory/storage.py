"""The three tiers: allocate on them, read and write them, and never exceed the budget.

Device and host memory are torch tensors; the disk tier consists of files in a folder of this run. Every
byte is charged to a ledger before it is allocated. This module does not know what the bytes mean.
"""

from __future__ import annotations

import contextlib
import resource
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import BudgetError, StorageError, UsageError
from engine.files.scratch import Scratch, sweep
from engine.memory.allocator import Overhang
from engine.memory.disk.aligned import empty_aligned
from engine.memory.disk.files import DirectFile, offload_errors
from engine.memory.disk.io_pool import IOPool
from engine.spec.hardware import Tier
from engine.spec.layout import ALIGNMENT
from engine.units import MIB, format_bytes

_OWN_PAGES = 1 * MIB
"""Host tensors of at least this size get pages of their own, which go back to the system when freed."""


class ByteLedger:
    """Counts the bytes in every tier and refuses to exceed a limit; safe to use from several threads."""

    def __init__(self, limits: Mapping[Tier, int], unified: bool = False) -> None:
        """With ``unified``, device and host are one memory with the host's limit."""
        self.limits = dict(limits)
        self.unified = unified
        self.held = dict.fromkeys(Tier, 0)
        self.peak = dict.fromkeys(Tier, 0)
        self.peak_together = 0
        """Peak bytes of device and host together, where they are one memory."""

        self._lock = threading.Lock()

    def charge(self, tier: Tier, count: int, what: str) -> None:
        """Count ``count`` more bytes.

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
            if limited is Tier.HOST and self.unified:
                self.peak_together = max(self.peak_together, would_hold)
            self.peak[tier] = max(self.peak[tier], self.held[tier])

    def release(self, tier: Tier, count: int) -> None:
        """Count ``count`` bytes as free again."""
        with self._lock:
            self.held[tier] -= count


class DiskFile(DirectFile):
    """A file of the disk tier: created with its space reserved, deleted when it is closed."""

    def __init__(self, path: Path, size: int, pool: IOPool | None = None) -> None:
        """Create the file, so that a full disk shows now and not midway.

        Raises:
            StorageError: if the disk is full or cannot be written.
        """
        super().__init__(path, pool or IOPool(), create=size)

    def close(self) -> None:
        """Close and delete the file."""
        if not self.closed:
            super().close()
            self.path.unlink(missing_ok=True)


class Tiers:
    """The tiers of one run on one device.

    Attributes:
        device: what computes; its memory is the device tier.
        unified: whether device and host are one memory (a CPU without a pretend device).
        ledger: bytes in each tier.
        pool: the threads that read and write the disk.
    """

    def __init__(
        self,
        device: torch.device,
        unified: bool,
        limits: Mapping[Tier, int],
        offload_dir: Path,
        pool: IOPool | None = None,
    ) -> None:
        self.device = device
        self.unified = unified
        self.ledger = ByteLedger(limits, unified)
        self.pool = pool or IOPool()
        self._offload_dir = offload_dir
        self._scratch: Scratch | None = None
        self._serial = 0
        self._held: dict[int, tuple[Tier, int]] = {}
        self._serial_of: dict[int, int] = {}  # id of a tensor or file that is held
        self._files: dict[int, DiskFile] = {}
        self._opened: dict[Path, DirectFile] = {}
        self._overhang: Overhang | None = None
        sweep(offload_dir)  # killed runs' files, which may fill the disk, even if this run needs none there

    def mark(self) -> int:
        """The present moment, for `release_since`."""
        return self._serial

    def tensor(self, tier: Tier, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> Tensor:
        """Allocate a tensor of ``shape`` on the device or host tier; host memory is pinned for CUDA devices.

        Raises:
            BudgetError: if the tier's budget does not allow it.
            StorageError: if the machine does not have it.
        """
        count = torch.Size(shape).numel() * dtype.itemsize
        serial = self.reserve(tier, count, what)
        on_cuda = self.device.type == "cuda"
        try:
            if count >= _OWN_PAGES and not on_cuda:
                tensor = empty_aligned(count).view(dtype).view(shape)
            else:
                tensor = torch.empty(
                    shape, dtype=dtype, device=self.device if tier is Tier.DEVICE else "cpu",
                    pin_memory=on_cuda and tier is Tier.HOST,
                )  # fmt: skip
                if not on_cuda and count:  # fault pages in now, not when the run first writes them
                    tensor.view(-1).view(torch.uint8)[::ALIGNMENT] = 0
        except (RuntimeError, MemoryError, OSError) as error:
            self._release(serial)
            raise StorageError(
                f"{what}: the machine has no {format_bytes(count)} of {tier.value} memory left, "
                "although the budget allows it: lower the budget or the block"
            ) from error
        self._serial_of[id(tensor)] = serial
        return tensor

    def free(self, held: Tensor | DiskFile) -> None:
        """Give back a tensor [...], whose last reference the caller drops, or a file, which ends."""
        self._release(self._serial_of.pop(id(held)))

    def file(self, size: int, what: str) -> DiskFile:
        """Create a file on the disk tier.

        Raises:
            BudgetError: if the disk budget does not allow it.
            StorageError: if the disk is full or the folder cannot be written.
        """
        serial = self.reserve(Tier.DISK, size, what)
        try:
            file = DiskFile(self.folder / f"{serial:06d}.bin", size, self.pool)
        except BaseException:
            self._release(serial)
            raise
        self._files[serial] = file
        self._serial_of[id(file)] = serial
        return file

    def open(self, path: Path) -> DirectFile:
        """Open another's file for reading: not charged, never deleted, closed by `close`.

        Raises:
            StorageError: if it cannot be opened.
        """
        if path not in self._opened:
            self._opened[path] = DirectFile(path, self.pool)
        return self._opened[path]

    def reserve(self, tier: Tier, count: int, what: str) -> int:
        """Charge bytes that are allocated elsewhere; `release_since` gives them back.

        Raises:
            BudgetError: if the tier's budget does not allow it.
        """
        self.ledger.charge(tier, count, what)
        self._held[self._serial] = (tier, count)
        self._serial += 1
        return self._serial - 1

    def start_trimming(self) -> None:
        """From now on let `trim` keep the process from growing beyond the ledger: see `Overhang`."""
        if self.device.type == "cpu":
            held = self.ledger.held
            self._overhang = Overhang(lambda: held[Tier.DEVICE] + held[Tier.HOST])

    def trim(self) -> None:
        """Give back the process's memory beyond the ledger, if it grew; called between passes."""
        if self._overhang is not None:
            self._overhang.trim()

    def release_since(self, mark: int) -> None:
        """Give back everything that was allocated after `mark` and is still held, files included."""
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
        """This run's own folder in the offload folder; created when first needed."""
        if self._scratch is None:
            check_offload_dir(self._offload_dir)
            _allow_many_files()
            with offload_errors(self._offload_dir, "use"):
                self._scratch = Scratch(self._offload_dir)
        return self._scratch.path

    def close(self) -> None:
        """Give everything back, delete this run's folder and end the disk's threads."""
        self.pool.close()
        self.release_since(0)
        for file in self._opened.values():
            file.close()
        self._opened.clear()
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None


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


def _allow_many_files() -> None:
    """Raise the soft limit of open files: a model may have many shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
