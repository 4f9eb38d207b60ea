"""Keeps the weights in their tiers and brings a stage's weights to where they are computed with.

Whatever is not ready in the device tier is read, copied, unpacked and converted into one of two
buffers; both are allocated once, for the largest stage. Lanes carry, so all of this happens in the
job of one lane.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.memory.quantize import pack_rows, unpack_rows
from engine.memory.storage import DiskFile, Tiers
from engine.spec.hardware import Tier
from engine.spec.layout import SLOTS, MemoryPlan, aligned, needs_loading, stored_bytes
from engine.spec.model import ModelSpec, TensorSpec
from engine.spec.policy import Policy


@dataclass
class _Stored:
    """One weight in its tier."""

    spec: TensorSpec
    tier: Tier
    packed: bool
    loads: bool
    nbytes: int
    data: Tensor | None = None
    offset: int = 0

    @property
    def kept_dtype(self) -> torch.dtype:
        return torch.uint8 if self.packed else getattr(torch, self.spec.dtype)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        rows = self.spec.numel // self.spec.shape[-1] if self.packed else 0
        return (rows, self.nbytes // rows) if self.packed else self.spec.shape


class WeightStore:
    """All weights of a model, spread over the tiers."""

    def __init__(self, spec: ModelSpec, policy: Policy, plan: MemoryPlan, tiers: Tiers) -> None:
        """Reserve the space of every tensor; `fill` brings the values."""
        self._spec, self._policy, self._tiers = spec, policy, tiers
        self._compute_dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self._stored: dict[str, _Stored] = {}
        disk_bytes = 0
        for name, tensor in spec.tensors.items():
            tier = plan.weights[name]
            stored = _Stored(
                tensor, tier,
                packed=bool(policy.weight_quant and tensor.compressible),
                loads=needs_loading(tensor, tier, policy),
                nbytes=stored_bytes(tensor, tier, policy, spec.compute_bytes),
            )  # fmt: skip
            if tier is Tier.DISK:
                stored.offset = disk_bytes
                disk_bytes = aligned(disk_bytes + stored.nbytes)
            self._stored[name] = stored
        self._file: DiskFile | None = tiers.file(disk_bytes, "weights") if disk_bytes else None
        self._buffers = (
            [
                tiers.tensor(Tier.DEVICE, (plan.stage_buffer,), self._compute_dtype, "weight buffers")
                for _ in range(SLOTS)
            ]
            if plan.stage_buffer
            else []
        )
        largest = max((s.nbytes for s in self._stored.values() if s.loads), default=0)
        self._staging = tiers.tensor(Tier.HOST, (largest,), torch.uint8, "staging") if largest else None
        self._device_staging = (
            tiers.tensor(Tier.DEVICE, (largest,), torch.uint8, "staging")
            if largest and not tiers.unified
            else None
        )

    def fill(self, source: Iterable[tuple[str, Tensor]]) -> None:
        """Put every tensor that the source yields into its tier, one at a time.

        Raises:
            CheckpointError: if a tensor cannot be packed.
        """
        for name, value in source:
            stored = self._stored[name]
            if stored.packed:
                quant = self._policy.weight_quant
                assert quant is not None
                kept = torch.empty(stored.kept_shape, dtype=torch.uint8)
                try:
                    pack_rows(value.reshape(-1, value.shape[-1]), quant, kept)
                except ValueError as error:
                    raise CheckpointError(f"tensor {name!r} cannot be compressed: {error}") from error
            elif stored.loads:
                kept = value.to(stored.kept_dtype).contiguous()
            else:
                kept = value
            if stored.tier is Tier.DISK:
                assert self._file is not None
                self._file.write(stored.offset, kept.reshape(-1))
                continue
            dtype = self._compute_dtype if not stored.loads and value.is_floating_point() else kept.dtype
            stored.data = self._tiers.tensor(stored.tier, tuple(kept.shape), dtype, "weights")
            stored.data.copy_(kept)

    def needed(self) -> tuple[bool, ...]:
        """Per stage, whether any of its weights have to be loaded."""
        return tuple(any(self._stored[name].loads for name in names) for names in self._spec.stages)

    def load(self, stage: int, slot: int) -> int:
        """Bring a stage's weights into buffer ``slot``; returns the bytes that crossed a link."""
        moved, offset = 0, 0
        for name in self._spec.stages[stage]:
            stored = self._stored[name]
            if stored.loads:
                target = self._buffers[slot][offset : offset + stored.spec.numel]
                moved += self._load(stored, target)
                offset += stored.spec.numel
        return moved

    def tensors(self, stage: int, slot: int) -> dict[str, Tensor]:
        """A stage's weights by name, ready to compute with; valid until the slot is loaded again."""
        found: dict[str, Tensor] = {}
        offset = 0
        for name in self._spec.stages[stage]:
            stored = self._stored[name]
            if stored.loads:
                found[name] = self._buffers[slot][offset : offset + stored.spec.numel].view(stored.spec.shape)
                offset += stored.spec.numel
            else:
                assert stored.data is not None
                found[name] = stored.data
        return found

    def _load(self, stored: _Stored, target: Tensor) -> int:
        source = stored.data
        moved = 0
        if stored.tier is Tier.DISK:
            assert self._staging is not None and self._file is not None
            staged = self._staging[: stored.nbytes]
            if self._device_staging is not None and staged.is_pinned():
                torch.cuda.current_stream().synchronize()  # the copy that used the staging buffer last
            self._file.read(stored.offset, staged)
            source = staged.view(stored.kept_dtype).view(stored.kept_shape)
            moved += stored.nbytes
        assert source is not None
        if self._device_staging is not None and stored.tier is not Tier.DEVICE:
            onto = self._device_staging[: stored.nbytes].view(stored.kept_dtype).view(stored.kept_shape)
            source = onto.copy_(source, non_blocking=True)
            moved += stored.nbytes
        if stored.packed:
            assert self._policy.weight_quant is not None
            unpack_rows(source, self._policy.weight_quant, target.view(-1, stored.spec.shape[-1]))
        else:
            target.view(stored.spec.shape).copy_(source)
        return moved
