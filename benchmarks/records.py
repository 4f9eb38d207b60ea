"""Results as JSON lines that survive an interruption, as Markdown tables, and progress lines.

A line is appended after every repetition, so that a script that is started again skips what it has measured.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.machine import hardware
from engine.units import format_seconds
from harness.files import JsonLines, read_line
from harness.text_table import markdown_table

Repetition = dict[str, Any]
"""The figures of one repetition, by name."""

RESULTS = Path(__file__).resolve().parent.parent / "results" / "limits"
"""Where scripts write by default."""


class RepetitionLog:
    """A file of repetitions as JSON lines, of one machine or of several.

    Attributes:
        rows: the repetitions of this machine; only these count as measured.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        """Read the file; a last line that an interruption cut short is dropped.

        Args:
            keys: fields that together identify one repetition.
        """
        self._lines, self._keys = JsonLines(path, unchecked=True), tuple(keys)
        self._machine = machine()
        rows: list[Repetition] = []
        self._lines.read(rows.append)
        if self._lines.damaged:
            say(self._lines.complaint("is measured again"))
        self.rows = [row for row in rows if row.get("machine") == self._machine]
        self._done = {self._key(row) for row in self.rows if not row.get("again")}

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether the file has this repetition, other than one marked ``again``."""
        return self._key(row) in self._done

    def add(self, row: Repetition) -> Repetition:
        """Append one repetition with the time and the machine, and sync it to the disk."""
        row = {**row, "at": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": self._machine}
        self._lines.add(row)
        self.rows.append(row)
        if not row.get("again"):
            self._done.add(self._key(row))
        return row

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(key)) for key in self._keys)


def read_rows(paths: Iterable[Path]) -> list[Repetition]:
    """All lines of some files; one that was cut short or damaged is skipped."""
    rows = []
    for path in paths:
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                rows.append(read_line(line, unchecked=True))
            except ValueError:
                continue
    return rows


def machine() -> str:
    """The machine: CPU, threads, system and version of torch."""
    found = hardware(torch.device("cpu"), pretend=False)
    return f"{found['cpu']}, {found['threads']} threads, {platform.system()}, torch {torch.__version__}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    return "\n".join(markdown_table(lines, left=len(header), padded=False)) + "\n"


def say(text: str) -> None:
    """Print a line of progress to standard error; standard output is for results."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Eta:
    """Estimates the remaining time from the weights of the finished parts."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._left = sum(weights)
        self._done = 0.0
        self._began = time.monotonic()

    def step(self, weight: float) -> str:
        """Count ``weight`` as done; returns the elapsed and the remaining time as text."""
        self._done += weight
        self._left -= weight
        elapsed = time.monotonic() - self._began
        rest = elapsed * max(self._left, 0) / max(self._done, 1e-9)
        return f"{format_seconds(elapsed)} elapsed, about {format_seconds(rest)} left"
