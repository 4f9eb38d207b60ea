"""The packed store when the disk is full or fails, when processes die, and with several processes at once."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.errors import StorageError
from engine.memory.store.packed import PackedStore
from engine.memory.store.writer import Writer
from tests.support.engine_runs import files_below
from tests.support.store_entries import ABOUT, KEY, SIZES, TENSORS, content, make, write

ROOT = Path(__file__).resolve().parents[4]


def child(code: str, folder: Path) -> subprocess.Popen[str]:
    """Start a process with the helpers of store_entries; ``folder`` is the store."""
    prelude = (
        "import resource, sys, time\nfrom pathlib import Path\n"
        "from engine.memory.store.packed import PackedStore\nfrom tests.support.store_entries import *\n"
        "folder = Path(sys.argv[1])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for a child; its standard output and standard error."""
    return process.communicate(timeout=60)


KILLED = """
def half(writer):
    writer.put("layers.0.w", content("layers.0.w"))
    print("half", flush=True)
    time.sleep(60)
PackedStore(folder).obtain(KEY, ABOUT, TENSORS, half)
"""


def test_a_killed_writer_leaves_nothing_valid_and_is_cleared_away(tmp_path: Path) -> None:
    process = child(KILLED, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    store = PackedStore(tmp_path)
    assert store.entries() == [] and store.open(KEY) is None
    assert list(tmp_path.glob("writing-*")), "its process lives"
    process.send_signal(signal.SIGKILL)
    said(process)
    assert list(tmp_path.glob("writing-*")) and store.open(KEY) is None
    assert store.entries() == [] and files_below(tmp_path) == []


def test_who_waits_for_a_writer_that_is_killed_writes_itself(tmp_path: Path) -> None:
    process = child(KILLED, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    waiting = threading.Event()
    killer = threading.Thread(target=lambda: (waiting.wait(30), process.kill()))
    killer.start()
    with PackedStore(tmp_path).obtain(KEY, ABOUT, TENSORS, write, on_notice=lambda _: waiting.set()) as entry:
        entry.verify()
    killer.join()
    said(process)
    assert waiting.is_set() and len(files_below(tmp_path)) == 3


def test_a_removal_that_was_killed_is_finished(tmp_path: Path) -> None:
    make(tmp_path).close()
    (tmp_path / KEY).rename(tmp_path / f"gone-{KEY}-1-2")
    assert PackedStore(tmp_path).entries() == [] and files_below(tmp_path) == []


SLOW = """
def slowly(writer):
    print("writes", flush=True)
    write(writer)
    time.sleep(0.5)
with PackedStore(folder).obtain(KEY, ABOUT, TENSORS, slowly, on_notice=lambda line: print(line)) as entry:
    entry.verify()
    print(entry.key)
"""


def test_of_several_processes_one_writes_and_all_have_it(tmp_path: Path) -> None:
    processes = [child(SLOW, tmp_path) for _ in range(2)]
    results = [said(process) for process in processes]
    assert all(process.returncode == 0 for process in processes), results
    lines = [output.splitlines() for output, _ in results]
    assert sum("writes" in line for line in lines) == 1
    assert all(line[-1] == KEY for line in lines)
    assert all(len(line) <= 2 for line in lines), "each process prints its lines once"
    assert len(files_below(tmp_path)) == 3


def test_threads_of_one_process_wait_for_each_other(tmp_path: Path) -> None:
    writers: list[int] = []

    def slowly(writer: Writer) -> None:
        writers.append(threading.get_ident())
        time.sleep(0.2)
        write(writer)

    def want() -> None:
        PackedStore(tmp_path).obtain(KEY, ABOUT, TENSORS, slowly).close()

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(writers) == 1 and [entry.in_use for entry in PackedStore(tmp_path).entries()] == [False]


LIMITED = """
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    make(folder)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_real_limit_is_met_before_anything_is_written(tmp_path: Path) -> None:
    output, errors = said(child(LIMITED, tmp_path))
    assert output.startswith("StorageError cannot reserve 12.0 MiB"), (output, errors)
    assert output.count("\n") == 1 and files_below(tmp_path) == []


def failing(code: int) -> object:
    """A system call that always fails with an errno."""

    def fail(*args: object, **_: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev", "preadv", "fsync", "mkdir", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_failures_are_one_line_with_the_cure(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "x").close()  # threads and caches have been made
    (tmp_path / "store").mkdir()
    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, call, failing(code))
    with pytest.raises(StorageError) as caught:
        make(tmp_path / "store")
    monkeypatch.undo()
    message = str(caught.value)
    assert "\n" not in message and os.strerror(code) in message and str(tmp_path / "store") in message
    assert "--store or TIERBENCH_STORE" in message
    assert ("free space" in message and "are free" in message) == (code == errno.ENOSPC)
    assert files_below(tmp_path / "store") == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert [thread for thread in threading.enumerate() if thread.name.startswith("store-")] == []


def test_a_disk_that_fails_midway_stops_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops at once, not after all tensors have been made."""
    given: list[int] = []
    real = os.pwritev

    def failing_later(descriptor: int, parts: list[memoryview], offset: int) -> int:
        if not given:  # the space is being reserved
            return real(descriptor, parts, offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def endless(writer: Writer) -> None:
        for name in SIZES:
            for part in content(name).split(1 << 20):
                given.append(len(part))
                writer.put(name, part)
                time.sleep(0.05)

    monkeypatch.setattr(os, "pwritev", failing_later)
    with pytest.raises(StorageError, match="check the disk"):
        PackedStore(tmp_path).obtain(KEY, ABOUT, TENSORS, endless)
    assert 0 < sum(given) < sum(SIZES.values()) and files_below(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for root in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StorageError, match="check the path and its permissions") as caught:
            make(root)
        assert "\n" not in str(caught.value) and "--store" in str(caught.value)


def test_what_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path).close()
    monkeypatch.setattr(Path, "read_text", failing(errno.EACCES))
    with pytest.raises(StorageError, match=f"cannot read {tmp_path}.*Permission denied"):
        PackedStore(tmp_path).open(KEY)
    (listed,) = PackedStore(tmp_path).entries()
    assert "Permission denied" in listed.damage and listed.index is None


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_closed_folder_can_be_read_from(tmp_path: Path) -> None:
    make(tmp_path).close()
    tmp_path.chmod(0o500)
    try:
        with PackedStore(tmp_path).obtain(KEY, ABOUT, TENSORS, write) as entry:
            entry.verify()
    finally:
        tmp_path.chmod(0o700)
