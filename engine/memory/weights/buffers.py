"""The layout of a stage's weights in its buffer, and the reads that fill it.

Weights that are adjacent in one file are loaded with one read, as a layer has many small tensors. This module
moves no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from engine.memory.disk.files import DirectFile
from engine.spec.hardware import Tier
from engine.spec.layout import ALIGNMENT, IN_MEMORY, KeptWeight, aligned


@dataclass
class StoredWeight:
    """One weight in its tier: a tensor in memory, or an extent of a file."""

    kept: KeptWeight
    data: Tensor | None = None
    """Of the shape in which it is kept (`kept_shape`); None on the disk tier."""

    file: DirectFile | None = None
    offset: int = 0
    """Of its first byte in the file."""

    input_scale: Tensor | None = None
    """[width], what divides its activations."""

    @property
    def resident(self) -> Tensor:
        """The weight's tensor, of the shape in which it is kept; on the host or device tier only."""
        assert self.data is not None
        return self.data

    @property
    def end(self) -> int:
        """Offset behind its last byte in the file."""
        return self.offset + self.kept.nbytes


@dataclass(frozen=True)
class BufferPlace:
    """Where one weight goes in the buffer of its stage."""

    stored: StoredWeight
    raw: int | None
    """Offset of the bytes as they are kept; None if they are not loaded, or go through a shared buffer."""

    exact: int | None
    """Offset of the numbers after unpacking or conversion; None if none are made."""

    def as_kept(self, buffer: Tensor) -> Tensor:
        """The part of ``buffer``, [bytes] uint8, for the kept bytes; for the numbers if it has no other."""
        begin = self.exact if self.raw is None else self.raw
        assert begin is not None
        return buffer[begin : begin + self.stored.kept.nbytes]


@dataclass
class FileRun:
    """Adjacent weights of one file, which one read loads."""

    file: DirectFile
    offset: int
    end: int
    places: list[BufferPlace] = field(default_factory=list)

    def within(self, buffer: Tensor) -> Tensor:
        """The part of ``buffer``, [bytes] uint8, that it is read into; only for a layout ``in_place``."""
        begin = self.places[0].raw
        assert begin is not None
        return buffer[begin : begin + self.end - self.offset]


@dataclass(frozen=True)
class StageLayout:
    """What a stage's buffer holds, and the runs that are read into it."""

    places: Sequence[BufferPlace]
    runs: Sequence[FileRun]


def arrange(stored: Sequence[StoredWeight], in_place: bool) -> StageLayout:
    """Lay out the weights that are loaded into the buffer of a stage.

    Args:
        in_place: whether runs are read directly into the buffer. Every weight's offset is then congruent to
            that in its file modulo `ALIGNMENT`, for reads past the page cache. Otherwise it is a multiple
            of `IN_MEMORY`, as the device's kernels require.
    """
    position = 0
    places: dict[int, BufferPlace] = {}
    runs: list[FileRun] = []
    loaded = [weight for weight in stored if weight.kept.raw_bytes]
    for weight in sorted(loaded, key=_file_order):
        run = runs[-1] if runs and runs[-1].file is weight.file else None
        if run is not None and not 0 <= weight.offset - run.end < ALIGNMENT:
            run = None  # not adjacent
        if weight.file is None or not in_place:
            raw = aligned(position, IN_MEMORY)
        elif run is not None:
            raw = position + weight.offset - run.end
        else:
            raw = position + (weight.offset - position) % ALIGNMENT
        place = places[id(weight)] = BufferPlace(weight, raw, None)
        position = raw + weight.kept.nbytes
        if weight.file is None:
            continue
        if run is None:
            run = FileRun(weight.file, weight.offset, weight.end)
            runs.append(run)
        run.end = weight.end
        run.places.append(place)
    found = []
    for weight in stored:
        laid_out, exact = places.get(id(weight)), None
        if weight.kept.exact_bytes:
            exact = aligned(position, IN_MEMORY)
            position = exact + weight.kept.exact_bytes
        found.append(BufferPlace(weight, None if laid_out is None else laid_out.raw, exact))
    return StageLayout(found, runs)


def _file_order(weight: StoredWeight) -> tuple[bool, str, int]:
    path = str(weight.file.path) if weight.file is not None else ""
    return weight.kept.tier is not Tier.DISK, path, weight.offset
