"""Compares two models' next-token distributions, position by position.

The logits of the first model go to a file, one row per position, so that memory never holds more of them than
one pass yields; those of the second are compared as they come. The classes here receive logits from
``Engine.answer(..., on_logits=...)``. They know neither text nor what is being compared.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from engine.errors import DamagedFileError, StorageError, UsageError, first_line, storage_errors
from engine.files.whole import write_whole


@dataclass(frozen=True)
class ComparedPositions:
    """The positions of a call's requests that are compared; each has a row in the file."""

    firsts: tuple[int, ...]
    """Per request the first position, as ``on_logits`` counts them."""

    counts: tuple[int, ...]
    """Per request the number of positions from there on; 0 for none."""

    @property
    def rows(self) -> int:
        """Positions of all requests."""
        return sum(self.counts)

    def within(self, index: int, position: int, length: int) -> tuple[slice, slice]:
        """Which of ``length`` logits from a position on are compared, and their rows in the file."""
        begin = max(position, self.firsts[index])
        end = max(begin, min(position + length, self.firsts[index] + self.counts[index]))
        row = self._starts[index] + begin - self.firsts[index]
        return slice(begin - position, end - position), slice(row, row + end - begin)

    @cached_property
    def _starts(self) -> Sequence[int]:
        return [0, *accumulate(self.counts)]


class LogitFile:
    """Keeps logits in a ``.npy`` file of shape [rows, V], in float16 if they are float16, else in float32.

    The file gets its name only once every row is written: a killed process leaves ``<name>.partial``. Beside
    it is ``<name>.crc``, the CRC-32 of every row.
    """

    def __init__(self, path: Path, positions: ComparedPositions) -> None:
        self.path = path
        self._positions = positions
        self._partial = path.with_name(path.name + ".partial")
        self._rows: np.memmap | None = None
        self._written = np.zeros(positions.rows, dtype=bool)
        self._sums = np.zeros(positions.rows, dtype=np.uint32)

    def add(self, index: int, position: int, logits: torch.Tensor) -> None:
        """Keep the logits [R, V] of R positions of one request.

        Raises:
            StorageError: if they cannot be written.
        """
        chosen, rows = self._positions.within(index, position, len(logits))
        if rows.start == rows.stop:
            return
        kept = logits[chosen].detach().cpu()
        kept = kept if kept.dtype is torch.float16 else kept.float()
        if self._rows is None:
            self._rows = self._open(kept)
        self._rows[rows] = kept.numpy()
        self._sums[rows] = _row_sums(kept.numpy())
        self._written[rows] = True

    def finish(self) -> None:
        """Give the file its final name.

        Raises:
            StorageError: if it cannot be written, or rows are missing.
        """
        if self._rows is None or not self._written.all():
            missing = int((~self._written).sum())
            raise StorageError(f"{self.path} lacks the logits of {missing:,} positions: run again")
        write_whole(_sums_of(self.path), self._sums.tobytes())
        with storage_errors(self.path, "write"):
            self._rows.flush()
            os.replace(self._partial, self.path)
        self._rows = None

    def _open(self, like: torch.Tensor) -> np.memmap:
        shape = (self._positions.rows, like.shape[1])
        dtype = like.numpy().dtype
        with storage_errors(self._partial, "write", "compare fewer positions"):
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            with open(self._partial, "wb") as file:  # a full disk shows here, not as a bus error later
                os.posix_fallocate(file.fileno(), 0, shape[0] * shape[1] * dtype.itemsize + 4096)
            return np.lib.format.open_memmap(self._partial, mode="w+", dtype=dtype, shape=shape)


class LogitComparison:
    """Compares logits with those of a `LogitFile`.

    Attributes:
        kl: [rows] float64, KL(first || second) in nats; NaN where nothing came.
        agree: [rows] bool, whether both have the same most probable token.
    """

    def __init__(self, path: Path, positions: ComparedPositions) -> None:
        """Open the file of the first model's logits.

        Raises:
            DamagedFileError: if it is no such file, or has another number of rows than ``positions``.
        """
        try:
            self._rows = np.load(path, mmap_mode="r", allow_pickle=False)
            self._sums = np.frombuffer(_sums_of(path).read_bytes(), dtype=np.uint32)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedFileError(
                f"{path} is not a file of logits ({first_line(error)}): remove it"
            ) from error
        if self._rows.ndim != 2 or len(self._rows) != positions.rows or len(self._sums) != positions.rows:
            raise DamagedFileError(
                f"{path} has shape {self._rows.shape}, not {positions.rows:,} rows: remove it"
            )
        self._path = path
        self._positions = positions
        self.kl = np.full(positions.rows, np.nan)
        self.agree = np.zeros(positions.rows, dtype=bool)

    def add(self, index: int, position: int, logits: torch.Tensor) -> None:
        """Compare the logits [R, V] of R positions of one request.

        Raises:
            UsageError: if the two models have different vocabularies.
            DamagedFileError: if the first model's logits are not what was written.
        """
        chosen, rows = self._positions.within(index, position, len(logits))
        if rows.start == rows.stop:
            return
        stored = np.array(self._rows[rows])
        if (_row_sums(stored) != self._sums[rows]).any():
            raise DamagedFileError(f"{self._path} is damaged in rows {rows.start} to {rows.stop}: remove it")
        first = torch.from_numpy(stored)
        second = logits[chosen].detach().cpu()
        if first.shape != second.shape:
            raise UsageError(
                f"the models have vocabularies of {first.shape[1]:,} and {second.shape[1]:,} tokens"
            )
        self.kl[rows] = kl_divergence(first, second).numpy()
        self.agree[rows] = (first.argmax(-1) == second.argmax(-1)).numpy()


def _sums_of(path: Path) -> Path:
    """Where the checksums of a file's rows are."""
    return path.with_name(path.name + ".crc")


def _row_sums(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of each of the rows [R, V]; [R] uint32."""
    return np.array([zlib.crc32(row.tobytes()) for row in rows], dtype=np.uint32)


def kl_divergence(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(first || second) in nats between rows of logits [R, V], computed in float64; [R].

    Logits of minus infinity are tokens without probability; where the first gives one, it adds nothing.
    """
    p, q = first.double().log_softmax(-1), second.double().log_softmax(-1)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp_min(0)
