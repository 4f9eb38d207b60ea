"""Files are written whole or not at all, and a checksum finds what is not what was written."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path

import pytest

from engine.errors import StorageError
from engine.files.whole import CHECKSUM, sealed, unsealed, write_whole

CONTENT = {"name": "käse", "parts": [1, 2.5, None, {"7": -1e-9}], "nan": float("inf"), "empty": {}}


def test_a_sealed_object_comes_back_however_it_is_formatted() -> None:
    for indent in (None, 1, 4):
        assert unsealed(json.loads(json.dumps(sealed(CONTENT), indent=indent))) == CONTENT
    assert unsealed(json.loads(json.dumps(sealed({7: (1, 2)})))) == {"7": [1, 2]}  # type: ignore[dict-item]
    assert unsealed([1]) == [1] and unsealed(CONTENT) == CONTENT, "of earlier versions"


def test_no_changed_bit_goes_unnoticed() -> None:
    data = json.dumps(sealed(CONTENT), indent=1).encode()
    rng = random.Random(0)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(7)
        try:
            found = unsealed(json.loads(bytes(changed)))
        except ValueError:
            continue
        found.pop(next((key for key in found if key not in CONTENT), ""), None)  # the checksum's own name
        assert found == CONTENT, f"bit in byte {place}"


@pytest.mark.parametrize("change", [{"name": "other"}, {CHECKSUM: "00000000"}, {CHECKSUM: 5}, {"more": 1}])
def test_other_content_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="checksum"):
        unsealed(sealed(CONTENT) | change)


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    path.parent.mkdir()
    (path.parent / ".file.tmp").write_bytes(b"half of something much longer")
    write_whole(path, "text")
    assert path.read_text() == "text" and [one.name for one in path.parent.iterdir()] == ["file"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="free space") as caught:
            write_whole(path, b"after")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"before" and [one.name for one in tmp_path.iterdir()] == ["file"]
    write_whole(path, b"after")
    assert path.read_bytes() == b"after"


def test_writers_at_once_leave_one_of_their_contents(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([65 + index]) * 50_000 for index in range(8)]
    threads = [threading.Thread(target=write_whole, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and [one.name for one in tmp_path.iterdir()] == ["file"]
