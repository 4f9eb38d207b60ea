"""Files beside the page cache: any piece goes to its place at any offset, and errors are raised."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import StorageError
from engine.memory.disk import files as disk
from engine.memory.disk import io_pool
from engine.memory.disk.aligned import empty_aligned, span
from engine.memory.disk.files import DirectFile, transfer_pieces
from engine.memory.disk.io_pool import IOPool
from engine.memory.storage import DiskFile
from engine.spec.layout import ALIGNMENT
from tests.support.engine_runs import io_threads
from tests.support.page_cache import resident_pages

SIZE = 100 * ALIGNMENT + 1234
BOUNCE = 4 * ALIGNMENT

# Where a piece ends and the next one begins, and the place of its memory: near block borders, or anywhere.
NEAR = st.builds(
    lambda block, shift: min(max(block * ALIGNMENT + shift, 0), SIZE),
    st.integers(0, SIZE // ALIGNMENT + 1),
    st.sampled_from((0, 0, 0, 1, -1, 64, 2048)),
)
CUTS = st.lists(NEAR | st.integers(0, SIZE), min_size=2, max_size=12).map(sorted)
SHIFTS = st.sampled_from((0, 0, 1, 64, 4095)) | st.none()
"""Of a piece's memory from a block's begin; None for one that suits its place in the file."""


def refuse(*_: object, **__: object) -> None:
    """Stand in for the probe of a file system without direct I/O."""
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.fixture(params=["direct", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether direct I/O works or is made to fail."""
    if request.param == "buffered":
        monkeypatch.setattr(disk, "_probe", refuse)
    monkeypatch.setattr(disk, "BOUNCE_BYTES", BOUNCE)
    return str(request.param)


@pytest.fixture
def pool() -> Iterator[IOPool]:
    """Three threads, with requests small enough that every large piece is split."""
    pool = IOPool(threads=3, request_bytes=8 * ALIGNMENT)
    yield pool
    pool.close()
    assert io_threads() == []


def memory(offset: int, count: int, shift: int | None) -> torch.Tensor:
    """Memory for ``count`` bytes that begins ``shift`` bytes after an aligned address, [count] uint8."""
    shift = offset % ALIGNMENT if shift is None else shift
    return empty_aligned(count + ALIGNMENT)[shift : shift + count]


def need_direct(file: DirectFile) -> None:
    """Skip the test where the file system has no direct I/O."""
    if not file.direct:
        pytest.skip(f"{file.path.parent}: {file.reason}")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pieces_land_where_they_belong(
    data: st.DataObject, way: str, pool: IOPool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Neighbouring pieces share blocks; some are written, some are not; a bytearray is the oracle."""
    path = tmp_path_factory.mktemp("disk") / "x.bin"
    file = DiskFile(path, SIZE, pool)
    assert file.direct == (way == "direct") or file.reason
    model = bytearray(SIZE)
    file.write(0, torch.zeros(SIZE, dtype=torch.uint8))
    try:
        for round_ in range(1, 4):
            cuts = data.draw(CUTS)
            chosen: list[tuple[int, torch.Tensor]] = []
            for index, (begin, end) in enumerate(itertools.pairwise(cuts)):
                if data.draw(st.booleans()):
                    piece = memory(begin, end - begin, data.draw(SHIFTS))
                    piece.copy_((torch.arange(end - begin) * (2 * index + round_)) % 251)
                    model[begin:end] = piece.numpy().tobytes()
                    chosen.append((begin, piece))
            chosen = data.draw(st.permutations(chosen))
            assert file.write_many(chosen) == sum(len(piece) for _, piece in chosen)
            cuts = data.draw(CUTS)
            reads = [
                (begin, memory(begin, end - begin, data.draw(SHIFTS)))
                for begin, end in itertools.pairwise(cuts)
            ]
            file.read_many(reads)
            for begin, piece in reads:
                assert piece.numpy().tobytes() == model[begin : begin + len(piece)]
        assert path.read_bytes() == model, "and another reader sees the same"
        assert path.stat().st_size == SIZE
    finally:
        file.close()


def test_threads_that_share_blocks_do_not_undo_each_other(way: str, pool: IOPool, tmp_path: Path) -> None:
    """Each thread owns every fourth stretch of 1000 bytes, so nearly every block has several owners."""
    file = DiskFile(tmp_path / "x.bin", SIZE, pool)
    errors: list[BaseException] = []

    def write(owner: int) -> None:
        try:
            for _ in range(3):
                for begin in range(owner * 1000, SIZE - 1000, 4000):
                    file.write(begin, torch.full((1000,), owner + 1, dtype=torch.uint8))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(owner,)) for owner in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    stored = torch.empty(SIZE, dtype=torch.uint8)
    file.read(0, stored)
    whole = SIZE // 1000 - 1
    owners = stored[: whole * 1000].view(whole, 1000)
    assert torch.equal(owners, (torch.arange(whole) % 4 + 1).to(torch.uint8)[:, None].expand_as(owners))
    file.close()


def test_several_files_in_one_call(way: str, pool: IOPool, tmp_path: Path) -> None:
    files = [DiskFile(tmp_path / f"{index}.bin", 9000, pool) for index in range(5)]
    pieces = [(file, 100 * index, torch.full((5000,), index)) for index, file in enumerate(files)]
    bytes_ = [(file, at, piece.to(torch.uint8)) for file, at, piece in pieces]
    assert transfer_pieces(bytes_, writing=True) == 25_000
    back = [(file, at, torch.empty(5000, dtype=torch.uint8)) for file, at, _ in bytes_]
    assert transfer_pieces(back, writing=False) == 25_000
    assert all(torch.equal(got, put) for (_, _, got), (_, _, put) in zip(back, bytes_, strict=True))
    for file in files:
        file.close()
    assert list(tmp_path.iterdir()) == []


def test_large_pieces_of_suitable_memory_are_moved_straight(
    pool: IOPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its memory is aligned like its place in the file, only the edges of a piece go through a buffer."""
    file = DiskFile(tmp_path / "x.bin", 4 << 20, pool)
    need_direct(file)
    real, addresses = os.preadv, []

    def watch(descriptor: int, views: list[memoryview], offset: int) -> int:
        view = torch.frombuffer(views[0], dtype=torch.uint8)
        addresses.append((view.data_ptr(), len(views[0]), offset))
        return real(descriptor, views, offset)

    into = memory(1000, (4 << 20) - 2000, None)
    monkeypatch.setattr(os, "preadv", watch)
    file.read(1000, into)
    straight = [
        (at, count) for at, count, _ in addresses if into.data_ptr() <= at <= into.data_ptr() + len(into)
    ]
    assert sum(count for _, count in straight) == (4 << 20) - 2 * ALIGNMENT
    assert max(count for _, count, _ in addresses) <= pool.request_bytes
    assert all(
        at % ALIGNMENT == count % ALIGNMENT == offset % ALIGNMENT == 0 for at, count, offset in addresses
    )
    file.close()


def test_page_cache_does_not_grow(
    way: str, pool: IOPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Direct I/O leaves it alone; else written pages stay until the next sync, read ones are dropped."""
    monkeypatch.setattr(io_pool, "UNSYNCED_BYTES", 1 << 20)
    file = DiskFile(tmp_path / "x.bin", (8 << 20) + 100, pool)
    if way == "direct":
        need_direct(file)
    for part in range(8):
        file.write(part << 20, torch.ones(1 << 20, dtype=torch.uint8))
    file.write(8 << 20, torch.ones(100, dtype=torch.uint8))
    bound = 1 if way == "direct" else 2 * (1 << 20) // 4096
    assert resident_pages(file.path) <= bound
    file.sync()
    file.read(0, torch.empty((8 << 20) + 100, dtype=torch.uint8))
    assert resident_pages(file.path) <= bound
    file.close()


def test_the_reason_for_buffering_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = IOPool()
    assert pool.describe() == "unused"
    monkeypatch.setattr(disk, "_probe", refuse)
    file = DiskFile(tmp_path / "x.bin", 10_000, pool)
    assert not file.direct and "refuses" in file.reason and "Invalid argument" in file.reason
    assert pool.describe().startswith("buffered: the file system refuses")
    again = DiskFile(tmp_path / "y.bin", 10_000, pool)
    assert again.reason == file.reason
    file.close()
    again.close()


def test_probe_that_fails_for_another_reason_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(disk, "_probe", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        DiskFile(tmp_path / "x.bin", 10_000)
    assert list(tmp_path.iterdir()) == [] and len(os.listdir("/proc/self/fd")) == before


def test_existing_file_is_read_and_stays(way: str, pool: IOPool, tmp_path: Path) -> None:
    content = os.urandom(3 * ALIGNMENT + 77)
    (tmp_path / "x").write_bytes(content)
    file = DirectFile(tmp_path / "x", pool)
    into = torch.empty(len(content) - 5, dtype=torch.uint8)
    file.read(5, into)
    assert into.numpy().tobytes() == content[5:]
    with pytest.raises(StorageError, match="changed from outside"):
        file.read(6, into)
    file.close()
    file.close()
    assert (tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize("cut", [0, ALIGNMENT, ALIGNMENT + 500])
def test_file_cut_short_from_outside(cut: int, way: str, pool: IOPool, tmp_path: Path) -> None:
    file = DiskFile(tmp_path / "x.bin", 40 * ALIGNMENT, pool)
    os.truncate(file.path, cut)
    for into in (empty_aligned(40 * ALIGNMENT), memory(0, 40 * ALIGNMENT, 8)):
        with pytest.raises(StorageError, match="changed from outside") as caught:
            file.read(0, into)
        assert "\n" not in str(caught.value)
    file.close()


def test_first_error_comes_out_once_nothing_is_going_on(
    way: str, pool: IOPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of many requests fails: those in flight are completed, the others are not started."""
    file = DiskFile(tmp_path / "x.bin", 64 << 20, pool)
    real, lock, calls, going = os.preadv, threading.Lock(), [], []

    def failing(descriptor: int, views: list[memoryview], offset: int) -> int:
        assert threading.current_thread().name.startswith("io-")
        with lock:
            calls.append(offset)
            number = len(calls)
        going.append(number)
        try:
            if number == 3:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if number > 3:
                time.sleep(0.002)  # else the other threads continue while one waits for a processor
            return real(descriptor, views, offset)
        finally:
            going.remove(number)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StorageError, match="Input/output error") as caught:
        file.read(0, empty_aligned(64 << 20))
    assert going == [] and len(calls) >= 3
    size = sorted(calls)[1] - sorted(calls)[0]
    assert len(calls) * size < file.size // 4, "most are left out"
    assert str(file.path) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.undo()
    assert file.read(0, empty_aligned(64 << 20)) == 64 << 20, "the threads go on"
    file.close()


def test_interrupt_waits_for_what_is_in_flight(pool: IOPool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release, done = threading.Event(), threading.Event(), []

    def request() -> None:
        begun.set()
        release.wait()
        done.append(1)

    pool.run([lambda: None] * 2)  # the threads have been started
    real = threading.Event.wait
    interrupts = iter([True, True])

    def interrupted(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread():
            if next(interrupts, False):
                real(begun)
                raise KeyboardInterrupt
            release.set()
        return real(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.run([request] * 50)
    assert len(done) <= pool.threads
    assert pool.run([lambda: done.append(2)] * 2) is None and done.count(2) == 2


def test_few_requests_overtake_many() -> None:
    pool = IOPool(threads=1)
    begun, release, order = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        release.wait()

    def asks(name: str, count: int) -> threading.Thread:
        return threading.Thread(target=pool.run, args=([lambda: order.append(name)] * count,))

    weights = threading.Thread(target=pool.run, args=([first] + [lambda: order.append("weights")] * 9,))
    weights.start()
    begun.wait()
    others = [asks("kv", 3), asks("more weights", 12)]
    for other in others:
        other.start()
    while len(pool._calls) < 3:
        time.sleep(0.001)
    release.set()
    for caller in (weights, *others):
        caller.join()
    pool.close()
    assert order == ["kv"] * 3 + ["weights"] * 9 + ["more weights"] * 12


def test_closing_waits_and_the_pool_can_be_used_again(pool: IOPool) -> None:
    begun, release, done = threading.Event(), threading.Event(), []

    def request() -> None:
        begun.set()
        release.wait()
        done.append(1)

    caller = threading.Thread(target=pool.run, args=([request] * 8,))
    caller.start()
    begun.wait()
    closer = threading.Thread(target=pool.close)
    closer.start()
    assert len(done) < 8
    release.set()
    closer.join()
    caller.join()
    assert len(done) == 8 and io_threads() == []
    pool.run([lambda: done.append(2)] * 3)
    assert done.count(2) == 3


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 5 << 20])
def test_aligned_memory(count: int) -> None:
    tensor = empty_aligned(count)
    assert tensor.dtype is torch.uint8 and tensor.shape == (count,)
    assert not count or tensor.data_ptr() % ALIGNMENT == 0
    tensor.fill_(7)
    assert int(tensor.sum(dtype=torch.int64)) == 7 * count


def test_aligned_memory_is_touched_and_goes_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )

    before = resident()
    tensor = empty_aligned(64 << 20)
    assert resident() - before >= 63 << 20
    view = tensor.view(torch.float32)[5:]
    del tensor
    assert resident() - before >= 63 << 20, "a view keeps it"
    del view
    assert resident() - before <= 1 << 20


def test_span() -> None:
    assert span(0, 1) == (0, 4096)
    assert span(4095, 2) == (0, 8192)
    assert span(8192, 4096) == (8192, 12288)
