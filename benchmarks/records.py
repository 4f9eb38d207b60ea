"""Results as JSON lines that survive an interruption, and how repeated figures are shown.

A line is appended after every repetition, so a script that is started again skips what is there.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.machine import hardware
from engine.units import format_seconds
from harness.text_table import markdown_table

Row = dict[str, Any]

RESULTS = Path(__file__).resolve().parent.parent / "results" / "limits"
"""Where scripts write by default."""


class Log:
    """A file of JSON lines, of one machine or of several.

    Attributes:
        rows: what this machine added, before or now; only that counts as measured.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        """Read what is there; a last line that an interruption cut short is dropped.

        Args:
            keys: fields that together name one repetition.
        """
        self._path, self._keys, self._machine = path, tuple(keys), machine()
        rows = read_rows([path]) if path.exists() else []
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.rows = [row for row in rows if row.get("machine") == self._machine]
        self._done = {self._key(row) for row in self.rows if not row.get("again")}

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether a repetition of this name is there, other than one marked ``again``."""
        return self._key(row) in self._done

    def add(self, row: Row) -> Row:
        """Append one repetition, with the time and the machine, and make sure it is on disk."""
        row = {**row, "at": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": self._machine}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        if not row.get("again"):
            self._done.add(self._key(row))
        return row

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(key)) for key in self._keys)


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """All lines of some files; a line that is cut short is left out."""
    rows = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def machine() -> str:
    """The machine in a few words."""
    found = hardware(torch.device("cpu"), pretend=False)
    return f"{found['cpu']}, {found['threads']} threads, {platform.system()}, torch {torch.__version__}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    return "\n".join(markdown_table(lines, left=len(header), padded=False)) + "\n"


def say(text: str) -> None:
    """A line for whoever watches; standard output is for results."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Eta:
    """How long the rest takes, judged by the weight of what is done."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._left = sum(weights)
        self._done = 0.0
        self._began = time.monotonic()

    def step(self, weight: float) -> str:
        """Note that so much is done; returns elapsed time and estimate in words."""
        self._done += weight
        self._left -= weight
        elapsed = time.monotonic() - self._began
        rest = elapsed * max(self._left, 0) / max(self._done, 1e-9)
        return f"{format_seconds(elapsed)} elapsed, about {format_seconds(rest)} left"
