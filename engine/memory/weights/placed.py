"""Keeps the weights in their tiers and loads a stage's weights to where they are computed with.

A weight is ready in place, or is loaded into one of two buffers: as it is kept, where kernels compute from
that form, else unpacked and converted. Both buffers are allocated once, for the largest stage; a large head
has a buffer of its own, and stays there. All of this happens in jobs of one stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from engine.kernels.backend import kernels_for
from engine.kernels.calls import Computable, PackedMatrix, RowSource
from engine.memory.disk.files import DirectFile, transfer_pieces
from engine.memory.staging import StagingPool, read_through
from engine.memory.storage import Tiers
from engine.memory.weights.buffers import BufferPlace, FileRun, StageLayout, StoredWeight, arrange
from engine.memory.weights.packing import as_kept, kept_shape
from engine.memory.weights.table_rows import gather
from engine.spec.extent import Extent
from engine.spec.hardware import Tier
from engine.spec.layout import (
    ALIGNMENT,
    LAST_STAGE_BUFFER,
    STAGING_BUFFERS,
    WEIGHT_SLOTS,
    KeptWeight,
    Ready,
    aligned,
)
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec


class WeightStore:
    """All weights of a model, spread over the tiers."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: MemoryPlan,
        tiers: Tiers,
        sources: Mapping[str, Extent] | None = None,
        smoothing: Mapping[str, Tensor] | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Reserve the space of every tensor; `fill` loads the values.

        Args:
            sources: by the tensor's name, files that hold weights already as they are to be kept: those on
                the disk tier stay in these files.
            smoothing: by the tensor's name, statistics [width] by which outliers move into a weight.
            scales: by the tensor's name, the divisor [width] of its activations, where a weight comes
                from a file.
        """
        self._spec, self._tiers, self._plan = spec, tiers, plan
        self._smoothing, self._sources = smoothing or {}, sources or {}
        self._compute_dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self._kernels = kernels_for(tiers.device)
        self._stored = {name: StoredWeight(kept) for name, kept in plan.weights.items()}
        for name, scale in (scales or {}).items():
            self._stored[name].input_scale = scale.to(tiers.device)
        self._place_on_disk()
        self._buffers = [
            tiers.tensor(Tier.DEVICE, (size,), torch.uint8, "weight buffers") for size in plan.stage_buffers
        ]
        self._few = [False] * WEIGHT_SLOTS
        self._head_is_there = False
        self._converting = threading.Lock()
        self._layouts: dict[int, StageLayout] = {}
        self._ready: dict[tuple[int, int, bool], dict[str, Computable]] = {}
        self._pool: StagingPool | None = None
        if plan.staging and not tiers.unified:
            self._pool = StagingPool(tiers, STAGING_BUFFERS, plan.staging)
        tier, size = (Tier.HOST, plan.staging) if tiers.unified else (Tier.DEVICE, plan.converting)
        self._shared = tiers.tensor(tier, (size,), torch.uint8, "staging") if size else None

    def _place_on_disk(self) -> None:
        """Find or reserve the bytes of the weights on the disk tier."""
        fresh: list[StoredWeight] = []
        end = 0
        for name, stored in self._stored.items():
            if stored.kept.tier is not Tier.DISK:
                continue
            source = self._sources.get(name)
            if source is None:
                stored.offset, end = end, aligned(end + stored.kept.nbytes)
                fresh.append(stored)
                continue
            self._tiers.reserve(Tier.DISK, aligned(stored.kept.nbytes), "weights")
            stored.file, stored.offset = self._tiers.open(source.path), source.offset
        if end:
            file = self._tiers.file(end, "weights")
            for stored in fresh:
                stored.file = file

    def fill(
        self,
        stream: Iterable[tuple[str, Tensor | PackedMatrix]],
        on_values: Callable[[int], None] = lambda values: None,
    ) -> None:
        """Load every weight into its tier: from its file, or from the stream that yields all others.

        Args:
            stream: name and weight, [...] as in the checkpoint or packed.
            on_values: called with the number of values of each weight once it is in place.

        Raises:
            CheckpointError: if a tensor cannot be packed.
        """
        for name, stored in self._stored.items():
            if name not in self._sources:
                continue
            if stored.kept.tier is not Tier.DISK:
                self._read_whole(stored, self._sources[name])
            on_values(stored.kept.tensor.numel)
        for name, value in stream:
            stored = self._stored[name]
            data, scale = as_kept(stored.kept, value, self._smoothing.get(name))
            if scale is not None:
                stored.input_scale = scale.to(self._tiers.device)
            if stored.kept.tier is Tier.DISK:
                assert stored.file is not None
                stored.file.write(stored.offset, data.reshape(-1))
            else:
                stored.data = self._allocate(stored).copy_(data)
            on_values(stored.kept.tensor.numel)

    def _allocate(self, stored: StoredWeight) -> Tensor:
        kept = stored.kept
        return self._tiers.tensor(kept.tier, kept_shape(kept), getattr(torch, kept.dtype), "weights")

    def _read_whole(self, stored: StoredWeight, source: Extent) -> None:
        """Read a weight of a memory tier from the file that holds it."""
        kept, file = stored.kept, self._tiers.open(source.path)
        stored.data = self._allocate(stored)
        as_it_is = kept.form is not None or kept.dtype == kept.tensor.dtype
        if as_it_is and stored.data.device.type == "cpu":
            file.read(source.offset, _bytes(stored.data))
            return
        data = torch.empty(source.nbytes, dtype=torch.uint8)
        file.read(source.offset, data)
        dtype = getattr(torch, kept.tensor.dtype if kept.form is None else kept.dtype)
        stored.data.copy_(data.view(dtype).view(kept_shape(kept)))

    def needed(self) -> tuple[bool, ...]:
        """Per stage, whether any of its weights have to be loaded in the next pass."""
        *others, head = self._loaded_per_pass
        return (*others, head and not self._head_is_there)

    @cached_property
    def _loaded_per_pass(self) -> tuple[bool, ...]:
        return tuple(
            any(self._stored[name].kept.brought(stage) for name in names)
            for stage, names in enumerate(self._spec.stages)
        )

    def _buffer_index(self, stage: int, buffer_index: int) -> int:
        """The buffer of a stage that was given one of the shared ones; a large head has its own."""
        own = self._plan.head_stays and stage == self._spec.num_stages - 1
        return LAST_STAGE_BUFFER if own else buffer_index

    @property
    def loads_at_once(self) -> int:
        """Number of calls of `load` that may run at the same time.

        Two where runs are read directly into a stage's buffer, so that the disk is busy from one stage to the
        next; weights that are converted share a buffer, so that they are loaded one stage at a time.
        """
        return 2 if self._tiers.unified and self._plan.computes_packed else 1

    def load(self, stage: int, buffer_index: int, rows: int | None = None) -> int:
        """Load a stage's weights into buffer ``buffer_index``; returns the bytes that crossed a link.

        Args:
            rows: tokens that will be computed with them, if known; for few tokens the weights stay packed.
        """
        buffer_index = self._buffer_index(stage, buffer_index)
        few = rows is not None and not self._plan.computes_packed
        self._few[buffer_index] = few = few and self._kernels.computes_packed(rows)
        layout, buffer = self._layout(stage), self._buffers[buffer_index]
        moved = self._load_runs(layout.runs, buffer)
        with self._converting:
            moved += sum(self._load_one(place, buffer, few) for place in layout.places)
        if buffer_index == LAST_STAGE_BUFFER:
            self._head_is_there = True
        return moved

    def tensors(self, stage: int, buffer_index: int) -> dict[str, Computable]:
        """A stage's weights by name, ready to compute with; valid until that buffer is loaded again."""
        buffer_index = self._buffer_index(stage, buffer_index)
        key = stage, buffer_index, self._few[buffer_index]
        if key not in self._ready:
            self._ready[key] = self._views(*key)
        return self._ready[key]

    def _views(self, stage: int, buffer_index: int, few: bool) -> dict[str, Computable]:
        found: dict[str, Computable] = {}
        for name in self._spec.stages[stage]:
            stored = self._stored[name]
            if stored.kept.ready is Ready.IN_PLACE:
                found[name] = _computable(stored, stored.resident)
            elif not stored.kept.brought(stage):
                found[name] = RowSource(partial(gather, stored, dtype=self._compute_dtype))
        for place in self._layout(stage).places:
            stored, kept, buffer = place.stored, place.stored.kept, self._buffers[buffer_index]
            if kept.ready is Ready.EXACT and not (few and _may_stay_packed(kept)):
                exact = self._exact(place, buffer)
                turned = kept.form is not None and kept.tensor.transposed
                exact = exact.t() if turned else exact.view(kept.tensor.shape)
                found[kept.tensor.name] = nn.Parameter(exact, requires_grad=False)
            elif kept.near:
                found[kept.tensor.name] = _computable(stored, stored.resident)
            else:
                found[kept.tensor.name] = _computable(stored, _as(stored, place.as_kept(buffer)))
        return found

    def _layout(self, stage: int) -> StageLayout:
        if stage not in self._layouts:
            stored = [self._stored[name] for name in self._spec.stages[stage]]
            loaded = [weight for weight in stored if weight.kept.brought(stage)]
            self._layouts[stage] = arrange(loaded, in_place=self._tiers.unified)
        return self._layouts[stage]

    def _exact(self, place: BufferPlace, buffer: Tensor) -> Tensor:
        """A weight's numbers to compute with, [rows, width]."""
        kept = place.stored.kept
        assert place.exact is not None
        end = place.exact + kept.tensor.numel * self._compute_dtype.itemsize
        return buffer[place.exact : end].view(self._compute_dtype).view(kept.tensor.matrix)

    def _load_runs(self, runs: Sequence[FileRun], buffer: Tensor) -> int:
        """Read runs of weights into a stage's buffer; all at once, as many are short."""
        if self._tiers.unified:
            return transfer_pieces([(r.file, r.offset, r.within(buffer)) for r in runs], writing=False)
        return sum(
            self._through_staging(
                run.file, [(place.stored.offset, place.as_kept(buffer)) for place in run.places]
            )
            for run in runs
        )

    def _through_staging(self, file: DirectFile, pieces: Sequence[tuple[int, Tensor]]) -> int:
        assert self._pool is not None
        return read_through(self._pool, file, pieces) + sum(len(piece) for _, piece in pieces)

    def _load_one(self, place: BufferPlace, buffer: Tensor, few: bool) -> int:
        """Load a weight that no run contains, and unpack or convert it."""
        stored, kept, moved = place.stored, place.stored.kept, 0
        stays = few and _may_stay_packed(kept)
        if kept.near:
            source = None if stays else _bytes(stored.resident)
        elif place.raw is not None or stays:
            source = place.as_kept(buffer)
            if stored.file is None or place.raw is None:
                moved = self._move(stored, source)
        else:
            assert self._shared is not None
            directly = stored.file is not None and self._tiers.unified
            begin = (stored.offset - self._shared.data_ptr()) % ALIGNMENT if directly else 0
            source = self._shared[begin : begin + kept.nbytes]
            moved = self._move(stored, source)
        if kept.ready is Ready.AS_KEPT or stays or source is None:
            return moved
        exact, data = self._exact(place, buffer), _as(stored, source)
        if kept.form is None:
            exact.view(kept.tensor.shape).copy_(data)
        else:
            self._kernels.unpack(data, kept.form, exact)
        return moved

    def _move(self, stored: StoredWeight, target: Tensor) -> int:
        """Copy one weight's bytes, as they are kept, from disk or host memory."""
        if stored.file is None:
            target.copy_(_bytes(stored.resident), non_blocking=True)
            return len(target)
        if not self._tiers.unified:
            return self._through_staging(stored.file, [(stored.offset, target)])
        stored.file.read(stored.offset, target)
        return len(target)


def _may_stay_packed(kept: KeptWeight) -> bool:
    """Whether few rows are computed faster from a weight's packed form, although many are not."""
    return kept.form is not None and kept.tensor.fused


def _computable(stored: StoredWeight, data: Tensor) -> Computable:
    form = stored.kept.form
    if form is None:
        return nn.Parameter(data, requires_grad=False)
    return PackedMatrix(data, form, *stored.kept.tensor.matrix, stored.input_scale)


def _bytes(data: Tensor) -> Tensor:
    return data.view(-1).view(torch.uint8)


def _as(stored: StoredWeight, source: Tensor) -> Tensor:
    """View bytes as the kept weight, of its `kept_shape` and dtype."""
    return source.view(getattr(torch, stored.kept.dtype)).view(kept_shape(stored.kept))
