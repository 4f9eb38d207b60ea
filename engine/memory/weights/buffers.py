"""Where a stage's weights lie in its buffer, and in how few reads they get there.

What lies next to each other in one file is brought by one read, for a layer has many small tensors. This
module moves nothing.
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
    """One weight in its tier: a tensor, or an extent of a file."""

    kept: KeptWeight
    data: Tensor | None = None
    file: DirectFile | None = None
    offset: int = 0
    """Where in the file it begins."""

    input_scale: Tensor | None = None

    @property
    def resident(self) -> Tensor:
        """It, where it lies in memory."""
        assert self.data is not None
        return self.data

    @property
    def end(self) -> int:
        """Where in the file it ends."""
        return self.offset + self.kept.nbytes


@dataclass(frozen=True)
class Place:
    """A weight's room in the buffer of its stage."""

    stored: StoredWeight
    raw: int | None
    """Where the bytes go that are kept; None for those that are not brought, or through a shared buffer."""

    exact: int | None
    """Where the numbers go that are made of them."""

    def as_kept(self, buffer: Tensor) -> Tensor:
        """Its part of the buffer for the bytes that are kept; that of the numbers where there is no other."""
        begin = self.exact if self.raw is None else self.raw
        assert begin is not None
        return buffer[begin : begin + self.stored.kept.nbytes]


@dataclass
class FileRun:
    """Neighbouring weights of one file."""

    file: DirectFile
    offset: int
    end: int
    places: list[Place] = field(default_factory=list)

    def within(self, buffer: Tensor) -> Tensor:
        """The part of a stage's buffer that it is read into, where `arrange` lays out ``in_place``."""
        begin = self.places[0].raw
        assert begin is not None
        return buffer[begin : begin + self.end - self.offset]


@dataclass(frozen=True)
class StageLayout:
    """A stage's buffer."""

    places: Sequence[Place]
    runs: Sequence[FileRun]


def arrange(stored: Sequence[StoredWeight], in_place: bool) -> StageLayout:
    """Lay out the weights that are brought into the buffer of a stage.

    Args:
        in_place: whether runs are read straight into the buffer. Every weight then lies there as far
            from a multiple of `ALIGNMENT` as in its file, for reads past the page cache. Otherwise it
            begins at a multiple of `IN_MEMORY`, as a device's products want.
    """
    position = 0
    places: dict[int, Place] = {}
    runs: list[FileRun] = []
    brought = [weight for weight in stored if weight.kept.raw_bytes]
    for weight in sorted(brought, key=_home):
        run = runs[-1] if runs else None
        on_disk = weight.file is not None
        joins = (
            on_disk
            and run is not None
            and run.file is weight.file
            and 0 <= weight.offset - run.end < ALIGNMENT
        )
        if not (on_disk and in_place):
            raw = aligned(position, IN_MEMORY)
        elif joins and run is not None:
            raw = position + weight.offset - run.end
        else:
            raw = position + (weight.offset - position) % ALIGNMENT
        place = places[id(weight)] = Place(weight, raw, None)
        position = raw + weight.kept.nbytes
        if weight.file is None:
            continue
        if not joins or run is None:
            run = FileRun(weight.file, weight.offset, weight.end)
            runs.append(run)
        run.end = weight.end
        run.places.append(place)
    found = []
    for weight in stored:
        raw_at = places[id(weight)].raw if id(weight) in places else None
        exact = None
        if weight.kept.exact_bytes:
            exact = aligned(position, IN_MEMORY)
            position = exact + weight.kept.exact_bytes
        found.append(Place(weight, raw_at, exact))
    return StageLayout(found, runs)


def _home(weight: StoredWeight) -> tuple[bool, str, int]:
    path = str(weight.file.path) if weight.file is not None else ""
    return weight.kept.tier is not Tier.DISK, path, weight.offset
