"""The disk tier: temporary files, one folder per run, and one clear line when the disk fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from engine.errors import BudgetError, StorageError, UsageError
from engine.memory.storage import DiskFile, Tiers
from engine.spec.hardware import Tier
from tests.support.engine_runs import bytes_below, files_below


@pytest.fixture
def tiers(offload: Path) -> Tiers:
    """Tiers of 1 MiB each; the offload folder does not exist yet."""
    return Tiers(torch.device("cpu"), False, dict.fromkeys(Tier, 1 << 20), offload)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_what_is_written_is_read_back(dtype: torch.dtype, tiers: Tiers) -> None:
    file = tiers.file(10_000, "test")
    values = (torch.arange(200) % 120).to(dtype)
    file.write(777, values)
    into = torch.empty(10, 20, dtype=dtype)
    file.read(777, into)
    assert torch.equal(into.view(-1), values)
    file.read(777 + 5 * dtype.itemsize, into[:1].view(-1))
    assert torch.equal(into[0], values[5:25])
    tiers.close()


def test_files_are_reserved_whole_and_deleted(tiers: Tiers, offload: Path) -> None:
    first, second = tiers.file(5000, "a"), tiers.file(0, "b")
    assert bytes_below(offload) == 5000 == tiers.ledger.held[Tier.DISK]
    assert first.path.stat().st_blocks * 512 >= 5000, "the space is taken, not only promised"
    tiers.free(first)
    tiers.free(second)
    assert bytes_below(offload) == 0 == tiers.ledger.held[Tier.DISK]
    tiers.close()
    assert files_below(offload) == []


def test_nothing_is_made_before_it_is_needed(tiers: Tiers, offload: Path) -> None:
    tiers.tensor(Tier.HOST, (10,), torch.float32, "x")
    assert files_below(offload) == []
    tiers.close()


def test_file_beyond_the_budget_is_refused(tiers: Tiers, offload: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        tiers.file((1 << 20) + 1, "weights")
    assert caught.value.tier == "disk" and "weights" in str(caught.value)
    assert bytes_below(offload) == 0


def test_tensors_are_charged_and_released(tiers: Tiers) -> None:
    tensor = tiers.tensor(Tier.DEVICE, (3, 5), torch.float16, "x")
    assert tensor.shape == (3, 5) and tiers.ledger.held[Tier.DEVICE] == 30
    tiers.free(tensor)
    assert tiers.ledger.held[Tier.DEVICE] == 0
    with pytest.raises(BudgetError):
        tiers.tensor(Tier.DEVICE, (1 << 20, 2), torch.uint8, "x")
    assert tiers.ledger.held[Tier.DEVICE] == 0


def fail_with(code: int) -> object:
    """A system call that always fails with an errno."""

    def failing(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    return failing


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev", "preadv", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_disk_errors_are_one_line_with_the_cure(
    call: str, code: int, tiers: Tiers, monkeypatch: pytest.MonkeyPatch
) -> None:
    existing = tiers.file(100, "before")
    open_before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, call, fail_with(code))
    with pytest.raises(StorageError) as caught:
        if call in ("posix_fallocate", "open"):
            tiers.file(100, "weights")
        elif call == "pwritev":
            existing.write(0, torch.zeros(10, dtype=torch.uint8))
        else:
            existing.read(0, torch.zeros(10, dtype=torch.uint8))
    monkeypatch.undo()
    message = str(caught.value)
    assert "\n" not in message and ".bin" in message and os.strerror(code) in message
    assert ("free space" in message) == (code == errno.ENOSPC)
    assert tiers.ledger.held[Tier.DISK] == 100, "what was not made is not charged"
    assert len(os.listdir("/proc/self/fd")) == open_before, "no descriptor is left open"
    tiers.close()


def test_short_reads_and_writes_are_continued(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may move fewer bytes than asked (it never moves more than 2 GiB at once)."""
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, at: write(fd, [parts[0][:7]], at))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: read(fd, [parts[0][:5]], at))
    file, values, into = tiers.file(1000, "x"), torch.arange(100), torch.empty(100, dtype=torch.int64)
    file.write(8, values)
    file.read(8, into)
    assert torch.equal(into, values)
    tiers.close()


def test_file_cut_short_from_outside(tiers: Tiers) -> None:
    file = tiers.file(1000, "x")
    os.truncate(file.path, 500)
    with pytest.raises(StorageError, match="changed from outside") as caught:
        file.read(400, torch.empty(200, dtype=torch.uint8))
    assert "byte 500" in str(caught.value) and "\n" not in str(caught.value)
    tiers.close()


def test_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"precious")
    with pytest.raises(StorageError):
        DiskFile(tmp_path / "x.bin", 100)
    assert (tmp_path / "x.bin").read_bytes() == b"precious"


def test_dead_folders_go_even_if_nothing_is_needed_on_disk(offload: Path) -> None:
    dead = offload / "run-0123456789abcdef"
    dead.mkdir(parents=True)
    mark = {"tool": "tierbench", "owner": os.getuid(), "token": "0123456789abcdef"}
    (dead / "tierbench.json").write_text(json.dumps(mark))
    (dead / "000001.bin").write_bytes(b"x" * 100)
    (offload / "run-2024").mkdir()
    (offload / "run-2024" / "lock").touch()
    Tiers(torch.device("cpu"), True, dict.fromkeys(Tier, 1 << 20), offload).close()
    assert [path.name for path in offload.iterdir()] == ["run-2024"]


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tiers = Tiers(torch.device("cpu"), True, dict.fromkeys(Tier, 1 << 20), tmp_path / "file" / "offload")
    with pytest.raises(UsageError) as caught:
        tiers.file(10, "x")
    assert "\n" not in str(caught.value) and "--offload-dir" in str(caught.value)
    assert tiers.ledger.held[Tier.DISK] == 0
