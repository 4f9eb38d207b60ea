"""Devices and pipes as outputs: written to as any program does, never read, locked or replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from engine.errors import StorageError
from engine.files.whole import write_whole
from engine.memory.weights.smoothing import write_statistics
from engine.planner import find_profile
from harness.files import JsonLines
from tests.harness.openai_batch.batch_files import ROOT, line, run, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", [line("a"), line("b")])


def ids(content: bytes) -> set[str]:
    return {json.loads(one)["custom_id"] for one in content.splitlines()}


def test_null_swallows_the_results(tiny_opt_dir: Path, source: Path) -> None:
    assert run(tiny_opt_dir, source, Path("/dev/null")) == 0
    assert Path("/dev/null").is_char_device() and not list(Path("/dev").glob(".null*"))


def test_a_full_device_is_one_line(
    tiny_opt_dir: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_opt_dir, source, Path("/dev/full")) == 1
    errors = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1 and "/dev/full" in errors[0] and "No space left" in errors[0]


def test_a_named_pipe_carries_the_results(tiny_opt_dir: Path, source: Path, tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    assert run(tiny_opt_dir, source, pipe) == 0
    reader.join(30)
    assert ids(got[0]) == {"a", "b"} and pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "pipe"]


@pytest.mark.parametrize("into", ["pipe", "file"])
def test_standard_output(into: str, tiny_opt_dir: Path, source: Path, tmp_path: Path) -> None:
    """A file behind standard output keeps what it held: the shell has opened it to append."""
    command = [sys.executable, str(ROOT / "run_helm.py"), "batch", "-i", str(source), "-o", "/dev/stdout"]
    command += ["--model", str(tiny_opt_dir), "--offload-dir", str(tmp_path / "off")]
    if into == "pipe":
        found = subprocess.run(command, capture_output=True, cwd=ROOT, check=True).stdout
    else:
        out = write(tmp_path / "out.jsonl", [{"custom_id": "before"}])
        with out.open("ab") as file:
            subprocess.run(command, stdout=file, stderr=subprocess.PIPE, cwd=ROOT, check=True)
        found = out.read_bytes()
    assert ids(found) == {"a", "b"} | ({"before"} if into == "file" else set())


def test_every_writer_of_one_file_takes_a_device(tmp_path: Path) -> None:
    import torch

    profile = find_profile("t4")
    for name in ("null", "full"):
        path = Path("/dev", name)
        writers: dict[str, Callable[[], object]] = {
            "atomic": partial(write_whole, path, "text"),
            "lines": partial(JsonLines(path).add, {"a": 1}),
            "statistics": partial(write_statistics, path, {"a": torch.ones(2)}, "digest", 1),
            "profile": partial(profile.save, path),
        }
        for what, write_it in writers.items():
            if name == "null":
                write_it()
            else:
                with pytest.raises((StorageError, OSError), match="No space left") as caught:
                    write_it()
                assert "\n" not in str(caught.value), what
        assert path.is_char_device() and not list(Path("/dev").glob(f"*{name}.*"))
