"""Hidden states between stages: each sequence's rows are kept in the tier of its slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.memory.disk.aligned import span
from engine.memory.storage import DiskFile, Tiers
from engine.spec.hardware import Tier
from engine.spec.layout import STAGE_BUFFERS
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec


class HiddenStore:
    """Keeps every device batch's hidden states while other batches compute."""

    def __init__(self, spec: ModelSpec, plan: MemoryPlan, tiers: Tiers, num_batches: int) -> None:
        self._tiers = tiers
        self._dtype: torch.dtype = getattr(torch, spec.compute_dtype)
        self._row_bytes = spec.hidden_size * self._dtype.itemsize
        self._slots = plan.activation_tiers
        self.moves = any(tier is not Tier.DEVICE for tier in plan.activation_tiers)
        self._resident: list[Tensor | None] = [None] * num_batches
        self._data: list[dict[Tier, Tensor]] = [{} for _ in range(num_batches)]  # by batch
        self._files: list[DiskFile] = []
        self._buffers: list[Tensor] = []
        self._staging: dict[str, Tensor] = {}
        self._loaded: list[Tensor | None] = [None] * STAGE_BUFFERS
        shape = (plan.batch_tokens, spec.hidden_size)
        if self.moves:
            self._buffers = [
                tiers.tensor(Tier.DEVICE, shape, self._dtype, "activation buffers")
                for _ in range(STAGE_BUFFERS)
            ]
            self._staging = {
                stream: tiers.tensor(Tier.HOST, shape, self._dtype, "staging") for stream in ("in", "out")
            }
            for data in self._data:
                for tier in set(plan.activation_tiers):
                    if tier is Tier.DISK:
                        self._files.append(tiers.file(plan.batch_tokens * self._row_bytes, "activations"))
                    else:
                        data[tier] = tiers.tensor(tier, shape, self._dtype, "activations")

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep a batch's hidden states [1, P, hidden] as they were computed, on the device."""
        self._resident[batch] = hidden

    def take(self, batch: int, buffer_index: int) -> Tensor:
        """The hidden states [1, P, hidden] that are the input of a batch's next stage."""
        ready, index = (self._loaded, buffer_index) if self.moves else (self._resident, batch)
        hidden, ready[index] = ready[index], None
        assert hidden is not None
        return hidden

    def store(self, batch: int, slots: Sequence[int], lengths: Sequence[int]) -> int:
        """Move a batch's rows to the tiers of its sequences' slots; returns bytes moved."""
        hidden, self._resident[batch] = self._resident[batch], None
        assert hidden is not None
        if hidden.is_cuda:  # computed on another CUDA stream: not to be reused before it is read on this one
            hidden.record_stream(torch.cuda.current_stream())
        moved = on_disk = 0
        for tier, rows, used in self._runs(slots, lengths):
            part = hidden[0, rows]
            if tier is Tier.DISK:
                on_disk = used + len(part)
                self._staging["out"][used:on_disk].copy_(part)
            else:
                self._data[batch][tier][used : used + len(part)].copy_(part, non_blocking=True)
            moved += 0 if tier is Tier.DEVICE else len(part) * self._row_bytes
        if on_disk:  # one write, up to the end of its last block, so that no block has to be read first
            file = self._files[batch]
            count = min(span(0, on_disk * self._row_bytes)[1], file.size)
            file.write(0, self._staging["out"].view(-1).view(torch.uint8)[:count])
        return moved

    def load(self, batch: int, buffer_index: int, slots: Sequence[int], lengths: Sequence[int]) -> int:
        """Gather a batch's rows in buffer ``buffer_index``; returns bytes moved."""
        moved = 0
        runs = self._runs(slots, lengths)
        self._read(batch, buffer_index, [(rows, used) for tier, rows, used in runs if tier is Tier.DISK])
        for tier, rows, used in runs:
            target = self._buffers[buffer_index][rows]
            if tier is not Tier.DISK:
                target.copy_(self._data[batch][tier][used : used + len(target)], non_blocking=True)
            moved += 0 if tier is Tier.DEVICE else len(target) * self._row_bytes
        self._loaded[buffer_index] = self._buffers[buffer_index][: sum(lengths)].unsqueeze(0)
        return moved

    def _read(self, batch: int, buffer_index: int, runs: Sequence[tuple[slice, int]]) -> None:
        """Read rows from disk into a buffer: directly where that is host memory, else with one read."""
        if not runs:
            return
        file, buffer = self._files[batch], self._buffers[buffer_index]
        if self._tiers.unified:
            file.read_many([(used * self._row_bytes, buffer[rows]) for rows, used in runs])
            return
        rows, used = runs[-1]
        staged = self._staging["in"][: used + rows.stop - rows.start]
        file.read(0, staged)
        for rows, used in runs:
            buffer[rows].copy_(staged[used : used + rows.stop - rows.start])

    def _runs(self, slots: Sequence[int], lengths: Sequence[int]) -> list[tuple[Tier, slice, int]]:
        """Runs of rows of one tier: the tier, the rows in the batch, and the first row in the tier."""
        runs: list[tuple[Tier, slice, int]] = []
        used = dict.fromkeys(Tier, 0)
        start = 0
        for slot, length in zip(slots, lengths, strict=True):
            tier = self._slots[slot]
            if runs and runs[-1][0] is tier:
                runs[-1] = (tier, slice(runs[-1][1].start, start + length), runs[-1][2])
            else:
                runs.append((tier, slice(start, start + length), used[tier]))
            used[tier] += length
            start += length
        return runs
