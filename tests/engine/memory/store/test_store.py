"""The packed store: entries are found by content and format, and are complete or not there."""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import DamagedEntryError, StorageError
from engine.memory.disk import io_pool
from engine.memory.store import pieces
from engine.memory.store.index import PIECE, Index, StoredTensor, key_of
from engine.memory.store.packed import PackedStore, default_root
from engine.memory.store.writer import Writer
from engine.spec.layout import ALIGNMENT
from tests.support.engine_runs import files_below
from tests.support.page_cache import resident
from tests.support.store_entries import ABOUT, KEY, SIZES, TENSORS, content, flip, make, read, write


def refuse_direct(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A file system without direct I/O, which refuses when a file is opened or when it is used."""
    real_open, real_write = os.open, os.pwritev

    def opened(path: str, flags: int, *rest: int, **where: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *rest, **where)

    refused: list[int] = []

    def written(descriptor: int, parts: list[memoryview], offset: int) -> int:
        if len(refused) < 1:
            refused.append(offset)
            raise OSError(22, "Invalid argument")
        return real_write(descriptor, parts, offset)

    if how == "opened":
        monkeypatch.setattr(os, "open", opened)
    elif how == "used":
        monkeypatch.setattr(os, "pwritev", written)


@pytest.mark.parametrize("refused", ["nowhere", "opened", "used"])
def test_what_is_written_is_found_again(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(monkeypatch, refused)
    monkeypatch.setattr(io_pool, "UNSYNCED_BYTES", PIECE)
    make(tmp_path).close()
    with make(tmp_path) as entry:
        assert entry.index.about == ABOUT and list(entry.index.tensors) == list(SIZES)
        ends = 0
        for name in SIZES:
            extent = entry.extent(name)
            assert extent.offset % ALIGNMENT == 0 and extent.offset - ends < ALIGNMENT
            assert torch.equal(read(entry, name), content(name)), name
            ends = extent.end
        entry.verify()
        assert entry.path.stat().st_size % ALIGNMENT == 0
    assert [path.name for path in files_below(tmp_path)] == [KEY, "index.json", "weights.bin"]


@pytest.mark.parametrize("refused", ["nowhere", "opened"])
def test_nothing_stays_in_the_page_cache(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(monkeypatch, refused)
    with make(tmp_path) as entry:
        if resident(entry.path) == 1:
            pytest.skip("this file system is the page cache")
        assert resident(entry.path) < 0.1
        entry.verify()
        assert resident(entry.path) < 0.1


def test_a_tensor_may_come_in_parts(tmp_path: Path) -> None:
    def parts(writer: Writer) -> None:
        for name in SIZES:
            for part in content(name).split(PIECE // 3 + 1) or (content(name),):
                writer.put(name, part)

    with PackedStore(tmp_path).obtain(KEY, ABOUT, TENSORS, parts) as entry:
        assert all(torch.equal(read(entry, name), content(name)) for name in SIZES)


def test_it_is_made_once(tmp_path: Path) -> None:
    def again(writer: Writer) -> None:
        raise AssertionError("made although it is there")

    make(tmp_path).close()
    PackedStore(tmp_path).obtain(KEY, ABOUT, TENSORS, again).close()


def put_wrongly(writer: Writer, case: str) -> None:
    """Break the writer's contract in one way."""
    if case == "unknown":
        writer.put("other", content("embed"))
    elif case == "twice":
        writer.put("embed", content("embed"))
        writer.put("embed", content("embed"))
    elif case == "mixed":
        writer.put("embed", content("embed")[:100])
        writer.put("head", content("head"))
    elif case == "long":
        writer.put("embed", torch.zeros(SIZES["embed"] + 1, dtype=torch.uint8))
    elif case == "kind":
        writer.put("embed", torch.zeros(SIZES["embed"] // 4))
    elif case == "strided":
        writer.put("embed", torch.zeros(2 * SIZES["embed"], dtype=torch.uint8)[::2])
    elif case == "short":
        write_all_but(writer, "head")
        writer.put("head", content("head")[:-1])
    elif case == "missing":
        write_all_but(writer, "layers.0.b")


def write_all_but(writer: Writer, left_out: str) -> None:
    """Write every tensor except one."""
    for name in SIZES:
        if name != left_out:
            writer.put(name, content(name))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unknown", "not to hold 'other'"), ("twice", "second time"), ("mixed", "before 'embed' is whole"),
        ("long", "is given 5,001"), ("kind", "uint8"), ("strided", "contiguous"),
        ("short", "without the whole of 'head'"), ("missing", "without the whole of 'layers.0.b'"),
    ],
)  # fmt: skip
def test_an_entry_that_is_not_as_announced_is_none(case: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        PackedStore(tmp_path).obtain(KEY, ABOUT, TENSORS, lambda writer: put_wrongly(writer, case))
    assert files_below(tmp_path) == []
    assert [thread for thread in threading.enumerate() if thread.name.startswith("store-")] == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(kind: type[BaseException], tmp_path: Path) -> None:
    def interrupted(writer: Writer) -> None:
        writer.put("layers.0.w", content("layers.0.w"))
        raise kind

    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kind):
        PackedStore(tmp_path).obtain(KEY, ABOUT, TENSORS, interrupted)
    assert files_below(tmp_path) == [] and PackedStore(tmp_path).open(KEY) is None
    assert len(os.listdir("/proc/self/fd")) == descriptors
    make(tmp_path).close()


@pytest.mark.parametrize(("name", "at"), [("embed", 0), ("layers.0.w", PIECE + 5), ("head", PIECE - 1)])
def test_a_flipped_byte_is_found_and_named(name: str, at: int, tmp_path: Path) -> None:
    with make(tmp_path) as entry:
        extent = entry.extent(name)
    flip(extent.path, extent.offset + at)
    PackedStore(tmp_path).open(KEY).close()  # type: ignore[union-attr]  # lengths tell nothing
    with pytest.raises(DamagedEntryError, match=f"tensor '{name}'") as caught:
        PackedStore(tmp_path).open(KEY, verify=True)
    assert "\n" not in str(caught.value) and "store remove" in str(caught.value)
    notices: list[str] = []
    with PackedStore(tmp_path).obtain(
        KEY, ABOUT, TENSORS, write, verify=True, on_notice=notices.append
    ) as entry:
        entry.verify()
    assert len(notices) == 1 and name in notices[0] and "made anew" in notices[0]


def test_what_does_not_read_back_is_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that writes wrong bytes."""
    real = os.pwritev

    def faulty(descriptor: int, parts: list[memoryview], offset: int) -> int:
        if offset == PIECE + 2 * ALIGNMENT:
            parts = [memoryview(bytes(len(parts[0])))]
        return real(descriptor, parts, offset)

    monkeypatch.setattr(os, "pwritev", faulty)
    refuse_direct(monkeypatch, "opened")
    with pytest.raises(StorageError, match="does not read back as written") as caught:
        make(tmp_path)
    assert "'layers.0.w'" in str(caught.value) and files_below(tmp_path) == []


DAMAGES = ["cut", "grown", "no weights", "no index", "index cut", "index changed", "other format"]


def test_a_few_pieces_are_checked_at_every_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path).close()
    flip(tmp_path / KEY / "weights.bin", 3 * PIECE)
    monkeypatch.setattr(pieces, "SPOT_CHECKED", 0.0)
    make(tmp_path).close()
    monkeypatch.setattr(pieces, "SPOT_CHECKED", 1.0)
    notices: list[str] = []
    with PackedStore(tmp_path).obtain(KEY, ABOUT, TENSORS, write, on_notice=notices.append) as entry:
        entry.verify()
    assert len(notices) == 1 and "'head'" in notices[0] and "made anew" in notices[0]


def test_spot_checks_find_a_bit_as_often_as_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path) as entry:
        monkeypatch.setattr(pieces, "SPOT_CHECKED", 0.25)
        draws = [pieces.chosen_pieces(entry.index.tensors) for _ in range(4000)]
    counts = Counter(number for draw in draws for number in draw)
    assert set(counts) == set(range(6)), "each piece of the file is one of those that are drawn"
    assert all(0.2 < count / len(draws) < 0.3 for count in counts.values())


def damage(folder: Path, how: str) -> None:
    """Damage an entry's files as a crash, a person or another version could."""
    weights, index = folder / "weights.bin", folder / "index.json"
    if how in ("cut", "grown"):
        os.truncate(weights, weights.stat().st_size + (ALIGNMENT if how == "grown" else -1))
    elif how in ("no weights", "no index"):
        (weights if how == "no weights" else index).unlink()
    elif how == "index cut":
        os.truncate(index, 100)
    elif how == "index changed":
        index.write_text(index.read_text().replace('"layers.0.b"', '"layers.0.c"'))
    else:
        index.write_text(index.read_text().replace('"format": 1', '"format": 0'))


@pytest.mark.parametrize("how", DAMAGES)
def test_other_damage_is_refused_without_reading_all_and_repaired(how: str, tmp_path: Path) -> None:
    make(tmp_path).close()
    damage(tmp_path / KEY, how)
    with pytest.raises(DamagedEntryError) as caught:
        PackedStore(tmp_path).open(KEY)
    message = str(caught.value)
    assert "\n" not in message and KEY in message and "run_helm.py store remove" in message
    (listed,) = PackedStore(tmp_path).entries()
    assert listed.damage == message and listed.index is None
    with make(tmp_path) as entry:
        entry.verify()
    assert len(files_below(tmp_path)) == 3


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"shape": (4, 2)}, {"form": "16"}])
def test_an_entry_of_other_tensors_is_made_anew(change: dict[str, object], tmp_path: Path) -> None:
    """A wrong kind or shape under the right name, left by a defect or a person."""
    other = tuple(replace(tensor, **change) for tensor in TENSORS)  # type: ignore[arg-type]
    with PackedStore(tmp_path).obtain(KEY, ABOUT, other, write) as entry:
        assert entry.index.holds(other)
    notices: list[str] = []
    with PackedStore(tmp_path).obtain(KEY, ABOUT, TENSORS, write, on_notice=notices.append) as entry:
        assert entry.index.holds(TENSORS)
    assert "other tensors" in notices[0]


def test_offsets_outside_of_the_file_are_not_believed(tmp_path: Path) -> None:
    with make(tmp_path) as entry:
        index = entry.index
    for offset in (-ALIGNMENT, 1, index.nbytes):
        placed = {**index.tensors, "embed": replace(index.tensors["embed"], offset=offset)}
        with pytest.raises(ValueError, match="'embed' is said to be at byte"):
            Index.from_json(replace(index, tensors=placed).to_json())


def test_keys_differ_by_content_and_by_bits_only() -> None:
    def changed(**change: object) -> tuple[StoredTensor, ...]:
        return (replace(TENSORS[0], **change), *TENSORS[1:])  # type: ignore[arg-type]

    keys = {
        KEY, key_of("sha256:2", TENSORS), key_of("sha256:1", TENSORS, "statistics"),
        key_of("sha256:1", changed(form="3")), key_of("sha256:1", changed(dtype="bfloat16")),
        key_of("sha256:1", TENSORS[1:]), key_of("sha256:1", changed(nbytes=1)),
    }  # fmt: skip
    assert len(keys) == 7
    assert key_of("sha256:1", tuple(TENSORS)) == KEY


def test_used_entries_stay(tmp_path: Path) -> None:
    store = PackedStore(tmp_path)
    with make(tmp_path) as first, make(tmp_path) as second:
        assert [entry.in_use for entry in store.entries()] == [True]
        assert not store.remove(KEY)
        first.close()
        assert not store.remove(KEY)
        assert torch.equal(read(second, "head"), content("head"))
    (listed,) = store.entries()
    assert not listed.in_use and listed.nbytes > sum(SIZES.values())
    assert store.remove(KEY) and files_below(tmp_path) == []
    with pytest.raises(StorageError, match="has no entry"):
        store.remove(KEY)


def test_the_folder_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERBENCH_STORE", str(tmp_path / "a"))
    assert default_root() == PackedStore().root == tmp_path / "a"
    assert PackedStore(tmp_path / "b").root == tmp_path / "b"
    monkeypatch.delenv("TIERBENCH_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert default_root() == tmp_path / "c" / "tierbench" / "store"
    assert PackedStore().entries() == [] and PackedStore().open(KEY) is None
    assert files_below(tmp_path) == [], "looking makes nothing"


def test_keys_lead_nowhere_else(tmp_path: Path) -> None:
    for key in ("../secret", "", KEY[:-1], KEY.upper()):
        with pytest.raises(ValueError, match="not a key"):
            PackedStore(tmp_path).open(key)
