"""Digests of weight files: of every byte, read once, and read again after every change."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import CheckpointError, StorageError
from engine.models import digests
from engine.models.digests import KeptDigests, digest_of
from engine.spec.request import Request


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files of several chunks, which count as large and have not been touched for long."""
    monkeypatch.setattr(digests, "CHUNK", 1000)
    monkeypatch.setattr(digests, "KEPT_FROM", 3000)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -1.0)
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    for name in ("a", "b"):
        (made / f"{name}.safetensors").write_bytes(hashlib.shake_128(name.encode()).digest(5500))
    return made


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("place", [0, 999, 1000, 2750, 5499])
def test_every_byte_counts(folder: Path, place: int) -> None:
    first = digest_of(folder, files(folder))
    assert first.startswith("sha256:") and digest_of(folder, files(folder)) == first
    flip(folder / "b.safetensors", place)
    assert digest_of(folder, files(folder)) != first


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def longer(folder: Path) -> None:
    with (folder / "a.safetensors").open("ab") as file:
        file.write(b"\0")


def renamed(folder: Path) -> None:
    (folder / "b.safetensors").rename(folder / "c.safetensors")


def swapped(folder: Path) -> None:
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (folder / f"{old}.safetensors").rename(folder / f"{new}.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        longer,
        renamed,
        swapped,
        lambda folder: (folder / "config.json").write_text("{ }"),
        lambda folder: (folder / "modeling_own.py").write_text("pass"),
        lambda folder: (folder / "quantize_config.json").write_text('{"sym": true}'),
    ],
)
def test_what_else_counts(folder: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    kept = KeptDigests(tmp_path / "kept")
    first = digest_of(folder, files(folder), kept)
    change(folder)
    assert digest_of(folder, files(folder), kept) == digest_of(folder, files(folder)) != first


def read_files(folder: Path, kept: KeptDigests, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read for the digest."""
    read: list[str] = []
    plain = digests._Reading.digest

    def digest(self: digests._Reading, path: Path) -> str:
        read.append(path.name)
        return plain(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(digests._Reading, "digest", digest)
        assert digest_of(folder, files(folder), kept) == digest_of(folder, files(folder))
    return read[: -len(files(folder))]


def test_a_file_is_read_once_until_it_is_touched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptDigests(tmp_path / "kept")
    assert read_files(folder, kept, monkeypatch) == ["a.safetensors", "b.safetensors"]
    assert read_files(folder, kept, monkeypatch) == []
    assert read_files(folder, KeptDigests(kept.folder, trusted=False), monkeypatch) == [
        "a.safetensors",
        "b.safetensors",
    ]
    before = (folder / "b.safetensors").stat()
    flip(folder / "b.safetensors", 77)
    os.utime(folder / "b.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_files(folder, kept, monkeypatch) == ["b.safetensors"], "its size and mtime are what they were"
    for damaged in kept.folder.iterdir():
        damaged.write_text('{"state": []')
    assert len(read_files(folder, kept, monkeypatch)) == 2
    assert [path.suffix for path in kept.folder.iterdir()] == [".json"] * 2, "nothing is left over"


def test_what_is_small_or_was_touched_just_now_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptDigests(tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(digests, "SETTLED_SECONDS", 2.0)
        digest_of(folder, files(folder), kept)
    with monkeypatch.context() as patch:
        patch.setattr(digests, "KEPT_FROM", 6000)
        digest_of(folder, files(folder), kept)
    assert not kept.folder.exists()


def test_a_folder_that_cannot_be_written_costs_time_only(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = KeptDigests(tmp_path / "file" / "kept")
    assert digest_of(folder, files(folder), kept) == digest_of(folder, files(folder))


def test_a_file_that_changes_while_it_is_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = digests._Reading.digest

    def digest(self: digests._Reading, path: Path) -> str:
        found = plain(self, path)
        time.sleep(0.02)
        longer(folder)
        return found

    monkeypatch.setattr(digests._Reading, "digest", digest)
    with pytest.raises(CheckpointError, match=r"a\.safetensors was changed while it was read"):
        digest_of(folder, files(folder))


def test_a_file_that_is_gone_is_one_line(folder: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        digest_of(folder, [folder / "none.safetensors"])


def test_long_reading_is_announced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SAY_FROM", 1)
    monkeypatch.setattr(digests, "_SAY_EVERY", 0.0)
    said: list[str] = []
    digest_of(folder, files(folder), on_notice=said.append)
    assert said[0].startswith("reading weights to identify them, 10.7 KiB") and len(said) > 1


def test_the_engine_reads_all_with_verify(tiny_opt_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted: list[bool] = []
    plain = digests.KeptDigests.find

    def find(self: KeptDigests, *args: object) -> str:
        trusted.append(self.trusted)
        return plain(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(digests.KeptDigests, "find", find)
    for verify in (False, True):
        with Engine(tiny_opt_dir, verify=verify) as engine:
            engine.check([Request((2,), 1)])
            assert len(trusted) == verify, "nothing is read before it is asked for"
            assert engine.spec.digest.startswith("sha256:")
    assert trusted == [True, False]
