"""Keeps the weights in their tiers and brings a stage's weights to where they are computed with.

A weight is ready in place, or is brought into one of two buffers: packed, where products are computed
straight from packed numbers, else unpacked and converted. Both buffers are allocated once, for the
largest stage. Lanes carry, so all of this happens in the job of one lane.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.kernels import ops
from engine.kernels.calls import PackedMatrix
from engine.memory.smoothing import Smoothing
from engine.memory.storage import DiskFile, Tiers
from engine.spec.hardware import Tier
from engine.spec.layout import (
    SLOTS,
    MemoryPlan,
    Ready,
    aligned,
    buffer_bytes,
    readiness,
    stored_bytes,
)
from engine.spec.model import ModelSpec, TensorSpec
from engine.spec.policy import Policy
from engine.spec.quant import QuantSpec


@dataclass
class _Stored:
    """One weight in its tier."""

    spec: TensorSpec
    tier: Tier
    form: QuantSpec | None
    ready: Ready
    nbytes: int
    """Bytes in the tier."""

    buffered: int
    """Bytes in a stage's buffer."""

    data: Tensor | None = None
    offset: int = 0
    input_scale: Tensor | None = None

    @property
    def kept_dtype(self) -> torch.dtype:
        return torch.uint8 if self.form else getattr(torch, self.spec.dtype)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        if self.form is None:
            return self.spec.shape
        rows, width = self.spec.matrix
        return self.form.blocks(rows), self.form.block_bytes(width)

    def packed(self, data: Tensor) -> PackedMatrix:
        """The weight over bytes that were brought somewhere."""
        assert self.form is not None
        return PackedMatrix(data, self.form, *self.spec.matrix, self.input_scale)


class WeightStore:
    """All weights of a model, spread over the tiers."""

    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        plan: MemoryPlan,
        tiers: Tiers,
        smoothing: Mapping[str, Smoothing] | None = None,
    ) -> None:
        """Reserve the space of every tensor; `fill` brings the values.

        Args:
            smoothing: how to move outliers of the activations into a weight, by the tensor's name.
        """
        self._spec, self._policy, self._tiers = spec, policy, tiers
        self._smoothing = smoothing or {}
        self._compute_dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self._stored: dict[str, _Stored] = {}
        disk_bytes = 0
        for name, tensor in spec.tensors.items():
            tier = plan.weights[name]
            ready = readiness(tensor, tier, policy, tiers.unified, plan.computes_packed)
            stored = _Stored(
                tensor, tier, policy.weight_quant.of(tensor), ready,
                nbytes=stored_bytes(tensor, tier, policy, spec.compute_bytes),
                buffered=buffer_bytes(tensor, ready, policy, spec.compute_bytes),
            )  # fmt: skip
            if tier is Tier.DISK:
                stored.offset = disk_bytes
                disk_bytes = aligned(disk_bytes + stored.nbytes)
            self._stored[name] = stored
        self._file: DiskFile | None = tiers.file(disk_bytes, "weights") if disk_bytes else None
        self._buffers = (
            [
                tiers.tensor(Tier.DEVICE, (plan.stage_buffer,), torch.uint8, "weight buffers")
                for _ in range(SLOTS)
            ]
            if plan.stage_buffer
            else []
        )
        self._few = [False] * SLOTS
        largest = max((s.nbytes for s in self._stored.values() if s.ready is not Ready.IN_PLACE), default=0)
        self._staging = tiers.tensor(Tier.HOST, (largest,), torch.uint8, "staging") if largest else None
        self._device_staging = (
            tiers.tensor(Tier.DEVICE, (largest,), torch.uint8, "staging")
            if largest and not tiers.unified
            else None
        )

    def fill(self, source: Iterable[tuple[str, Tensor | PackedMatrix]]) -> None:
        """Put every tensor that the source yields into its tier, one at a time.

        Raises:
            CheckpointError: if a tensor cannot be packed.
        """
        for name, value in source:
            stored = self._stored[name]
            kept = value.data if isinstance(value, PackedMatrix) else self._as_kept(stored, value)
            if stored.tier is Tier.DISK:
                assert self._file is not None
                self._file.write(stored.offset, kept.reshape(-1))
                continue
            exact_here = stored.form is None and stored.ready is Ready.IN_PLACE and kept.is_floating_point()
            dtype = self._compute_dtype if exact_here else kept.dtype
            stored.data = self._tiers.tensor(stored.tier, tuple(kept.shape), dtype, "weights")
            stored.data.copy_(kept)

    def _as_kept(self, stored: _Stored, value: Tensor) -> Tensor:
        if stored.form is None:
            return value if stored.ready is Ready.IN_PLACE else value.to(stored.kept_dtype).contiguous()
        name = stored.spec.name
        matrix = value.t() if stored.spec.transposed else value.reshape(stored.spec.matrix)
        smoothing = self._smoothing.get(name)
        if smoothing is not None and stored.form.activation_bits != 16:
            stored.input_scale, matrix = smoothing.apply(matrix.float(), self._tiers.device)
        try:
            kept = torch.empty(stored.kept_shape, dtype=torch.uint8)
            return ops.pack(matrix.contiguous(), stored.form, kept)
        except ValueError as error:
            raise CheckpointError(f"tensor {name!r} cannot be compressed: {error}") from error

    def needed(self) -> tuple[bool, ...]:
        """Per stage, whether any of its weights have to be loaded."""
        return tuple(
            any(self._stored[name].ready is not Ready.IN_PLACE for name in names)
            for names in self._spec.stages
        )

    def load(self, stage: int, slot: int, rows: int | None = None) -> int:
        """Bring a stage's weights into buffer ``slot``; returns the bytes that crossed a link.

        Args:
            rows: tokens that will be computed with them, if known; where these are few, they stay packed.
        """
        self._few[slot] = rows is not None and ops.computes_packed(self._tiers.device, rows)
        return sum(
            self._load(stored, target, self._ready(stored, slot))
            for stored, target in self._buffered(stage, slot)
        )

    def tensors(self, stage: int, slot: int) -> dict[str, Tensor | PackedMatrix]:
        """A stage's weights by name, ready to compute with; valid until the slot is loaded again."""
        found: dict[str, Tensor | PackedMatrix] = {}
        for name in self._spec.stages[stage]:
            stored = self._stored[name]
            if stored.ready is Ready.IN_PLACE:
                assert stored.data is not None
                found[name] = stored.packed(stored.data) if stored.form else stored.data
        for stored, target in self._buffered(stage, slot):
            ready = self._ready(stored, slot)
            if ready is Ready.EXACT:
                exact = self._exact(stored, target)
                turned = stored.form is not None and stored.spec.transposed
                found[stored.spec.name] = exact.t() if turned else exact.view(stored.spec.shape)
                continue
            data = stored.data if ready is Ready.IN_PLACE else target[: stored.nbytes].view(stored.kept_shape)
            assert data is not None
            found[stored.spec.name] = stored.packed(data)
        return found

    def _ready(self, stored: _Stored, slot: int) -> Ready:
        """In which form a weight is in a slot: for few rows packed, although it is planned unpacked."""
        if stored.form is None or not stored.spec.fused or not self._few[slot]:
            return stored.ready
        return Ready.IN_PLACE if stored.tier is Tier.DEVICE else Ready.PACKED

    def _buffered(self, stage: int, slot: int) -> Iterable[tuple[_Stored, Tensor]]:
        """A stage's weights that are brought into a buffer, each with its bytes of buffer ``slot``."""
        offset = 0
        for name in self._spec.stages[stage]:
            stored = self._stored[name]
            if stored.buffered:
                yield stored, self._buffers[slot][offset : offset + stored.buffered]
                offset += stored.buffered

    def _exact(self, stored: _Stored, target: Tensor) -> Tensor:
        """A buffer's bytes as rows of numbers to compute with."""
        values = target.view(self._compute_dtype)[: stored.spec.numel]
        return values.view(stored.spec.matrix)

    def _load(self, stored: _Stored, target: Tensor, ready: Ready) -> int:
        if ready is Ready.IN_PLACE:
            return 0
        source, moved = stored.data, 0
        straight = ready is Ready.PACKED and self._tiers.unified
        if stored.tier is Tier.DISK:
            assert self._staging is not None and self._file is not None
            staged = (target if straight else self._staging)[: stored.nbytes]
            if self._device_staging is not None and staged.is_pinned():
                torch.cuda.current_stream().synchronize()  # the copy that used the staging buffer last
            self._file.read(stored.offset, staged)
            source = staged.view(stored.kept_dtype).view(stored.kept_shape)
            moved += stored.nbytes
        if straight:
            return moved
        assert source is not None
        if self._device_staging is not None and stored.tier is not Tier.DEVICE:
            onto = (target if ready is Ready.PACKED else self._device_staging)[: stored.nbytes]
            onto = onto.view(stored.kept_dtype).view(stored.kept_shape)
            source = onto.copy_(source, non_blocking=True)
            moved += stored.nbytes
        if ready is Ready.PACKED:
            return moved
        if stored.form is not None:
            ops.unpack(source, stored.form, self._exact(stored, target))
        else:
            self._exact(stored, target).view(stored.spec.shape).copy_(source)
        return moved
