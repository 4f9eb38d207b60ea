"""Folders of a process: those of dead ones go, and nothing that somebody else made ever does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.files.scratch import Scratch, sweep

TOKEN = "0123456789abcdef"
MARK = {"tool": "tierbench", "owner": os.getuid(), "token": TOKEN, "process": 1, "boot": "before"}

HOLDER = """
import sys, time
from pathlib import Path
from engine.files.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
(scratch.path / "000001.bin").write_bytes(b"x" * 100)
print("held", flush=True)
time.sleep(60)
"""

KILLED_IN = """
import os, pathlib, sys
from engine.files import scratch
owner, name = (pathlib.Path if sys.argv[2] == "rename" else os), sys.argv[2]
original = getattr(owner, name)
def dies(*args, **more):
    if sys.argv[3] == "before":
        os._exit(9)
    original(*args, **more)
    os._exit(9)
claim = scratch._claim
def armed(parent):
    setattr(owner, name, dies)
    return claim(parent)
scratch._claim = armed
scratch.Scratch(pathlib.Path(sys.argv[1]))
"""


def marked(**changes: object) -> Callable[[Path], None]:
    """Makes a folder with a mark and the data of a dead run."""

    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "tierbench.json").write_text(json.dumps(MARK | changes))
        (folder / "000001.bin").write_bytes(b"data")

    return make


def with_file(name: str, content: str = "") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / name).write_text(content)

    return make


def linked(folder: Path) -> None:
    """A link to a folder that would be removed."""
    marked()(folder.parent / "elsewhere" / folder.name)
    folder.symlink_to(folder.parent / "elsewhere" / folder.name)


@pytest.mark.parametrize(
    ("name", "make", "goes"),
    [
        (f"run-{TOKEN}", marked(), True),
        (f"run-{TOKEN}", marked(boot="now"), True),
        (f"run-{TOKEN}", marked(token="f" * 16), False),
        (f"run-{TOKEN}", marked(tool="other"), False),
        (f"run-{TOKEN}", marked(owner=os.getuid() + 1), False),
        (f"run-{TOKEN}", with_file("tierbench.json"), False),
        (f"run-{TOKEN}", with_file("tierbench.json", "[" * 100_000), False),
        (f"run-{TOKEN}", with_file("tierbench.json", '"tierbench"'), False),
        (f"run-{TOKEN}", with_file("lock"), False),
        (f"run-{TOKEN}", linked, False),
        ("run-2024", marked(), False),
        ("run-2024", with_file("lock"), False),
        ("run", with_file("precious.txt"), False),
        (f".tierbench-{TOKEN}", lambda folder: folder.mkdir(parents=True), True),
        (f".tierbench-{TOKEN}", with_file("tierbench.json", '{"tool": "ti'), True),
        (f".tierbench-{TOKEN}", with_file("precious.txt"), False),
        (".tierbench", lambda folder: folder.mkdir(parents=True), False),
    ],
)
def test_only_marked_folders_of_dead_processes_are_removed(
    tmp_path: Path, name: str, make: Callable[[Path], None], goes: bool
) -> None:
    folder = tmp_path / "chosen" / name
    make(folder)
    before = sorted(str(path) for path in (tmp_path / "chosen").rglob("*"))
    sweep(tmp_path / "chosen")
    if goes:
        assert not folder.exists()
    else:
        assert sorted(str(path) for path in (tmp_path / "chosen").rglob("*")) == before


def test_a_folder_stays_while_its_process_lives_and_goes_after_it_was_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"held\n"
        with Scratch(tmp_path) as mine:
            sweep(tmp_path)
            assert len(list(tmp_path.glob("run-*/000001.bin"))) == 1, "its process lives"
            assert mine.path.is_dir()
        assert not mine.path.exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["open", "write", "rename"])
def test_a_kill_while_a_folder_is_made_leaves_nothing_for_long(tmp_path: Path, call: str, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_IN, str(tmp_path), call, when])
    assert done.returncode == 9 and len(list(tmp_path.iterdir())) == 1
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    sweep(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    sweep(tmp_path / "file")
    assert (tmp_path / "file").exists()


def test_without_locks_nothing_is_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    marked()(tmp_path / f"run-{TOKEN}")
    monkeypatch.setattr("fcntl.flock", refused)
    with Scratch(tmp_path):
        assert (tmp_path / f"run-{TOKEN}" / "000001.bin").exists()
