"""Where a model's weights come from, before they are loaded into their tiers.

Numbers that stay as the checkpoint has them are read from its own files, so that they are on the disk only
once. Packed, fused and random weights are written to the packed store first, once for all runs. The others
are streamed: weights that are only converted, and random ones in a memory tier.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels.calls import PackedMatrix
from engine.memory.storage import ByteLedger
from engine.memory.store.index import About, StoredTensor, key_of
from engine.memory.store.packed import OnNotice, PackedStore, StoreEntry
from engine.memory.store.writer import Writer
from engine.memory.weights.packing import as_kept
from engine.models.adapter import LayeredModel
from engine.models.checkpoint import Checkpoint, RandomWeights
from engine.spec.extent import Extent
from engine.spec.hardware import Tier
from engine.spec.layout import KeptWeight
from engine.spec.memory_plan import MemoryPlan
from engine.spec.model import ModelSpec
from engine.spec.policy import Policy
from engine.spec.quant import QuantSpec
from engine.spec.record import WeightsRecord
from engine.spec.request import CallProgress, OnProgress
from engine.trace import Trace

OnValues = Callable[[int], None]
"""Called with the number of values of every weight that was written to the store."""

_SCALE = "#input_scale"
"""Suffix of the name under which the store keeps the divisor of a weight's activations."""


@dataclass
class Sources:
    """Where the weights come from.

    Attributes:
        extents: by name, those that a file has as they are to be kept.
        streamed: names of the others.
        scales: by name, the divisor [width] of the activations of weights in the store.
        entry: the store's, if one is used; locked until it is closed.
    """

    extents: dict[str, Extent]
    streamed: frozenset[str]
    scales: dict[str, Tensor] = field(default_factory=dict)
    entry: StoreEntry | None = None

    def close(self) -> None:
        """Release the store's entry."""
        if self.entry is not None:
            self.entry.close()

    def describe(self) -> WeightsRecord:
        """For the record of a run."""
        entry = self.entry
        key, nbytes = (None, 0) if entry is None else (entry.key, entry.index.nbytes)
        return WeightsRecord(len(self.extents), len(self.streamed), key, nbytes)


@dataclass(frozen=True)
class Loader:
    """Finds a model's weights, and writes those that have to be packed to the store.

    Attributes:
        source: of the numbers.
        own_files: what `in_own_files` found.
        calibration: file of the statistics behind ``smoothing``, if there is one.
        verify: whether the store's checksums are compared before it is used.
    """

    source: Checkpoint | RandomWeights
    own_files: Mapping[str, Extent]
    model: LayeredModel
    spec: ModelSpec
    policy: Policy
    store: PackedStore
    smoothing: Mapping[str, Tensor]
    verify: bool = False

    def find(
        self, plan: MemoryPlan, on_values: OnValues | None = None, on_notice: OnNotice | None = None
    ) -> Sources:
        """Find the weights, and write to the store what has to be there.

        Raises:
            CheckpointError: if the checkpoint is damaged or cannot be packed.
            StorageError: if the store cannot be read or written.
        """
        to_pack = {name for name, kept in plan.weights.items() if isinstance(kept.form, QuantSpec)}
        extents = {name: extent for name, extent in self.own_files.items() if name not in to_pack}
        rest = {name: kept for name, kept in plan.weights.items() if name not in extents}
        needs_file = any(kept.tier is Tier.DISK for kept in rest.values())
        if not needs_file and not (to_pack and self.source.kind == "trained"):  # packing takes long
            return Sources(extents, frozenset(rest))
        tensors = self._tensors(rest)
        spec, calibration = self.spec, ""
        if any(map(self._scaled, rest.values())):
            calibration = hashlib.sha256(Path(self.policy.calibration).read_bytes()).hexdigest()
        about = About(
            spec.path,
            spec.architecture,
            spec.digest,
            spec.weights,
            str(self.policy.weight_quant),
            calibration,
        )
        entry = self.store.obtain(
            key_of(spec.digest, tensors, calibration), about, tensors,
            lambda writer: self._write(writer, rest, on_values), verify=self.verify, on_notice=on_notice,
        )  # fmt: skip
        found = Sources(extents | {name: entry.extent(name) for name in rest}, frozenset(), entry=entry)
        for name, kept in rest.items():
            if self._scaled(kept):
                extent = entry.extent(name + _SCALE)
                with extent.path.open("rb") as file:
                    file.seek(extent.offset)
                    found.scales[name] = torch.frombuffer(
                        bytearray(file.read(extent.nbytes)), dtype=torch.float32
                    )
        return found

    def _scaled(self, kept: KeptWeight) -> bool:
        form = kept.form
        return kept.tensor.name in self.smoothing and form is not None and form.activation_bits != 16

    def _tensors(self, rest: Mapping[str, KeptWeight]) -> Sequence[StoredTensor]:
        """The tensors of the entry, in the order of the stages."""
        tensors = []
        for name, kept in rest.items():
            tensor, packed = kept.tensor, isinstance(kept.form, QuantSpec)
            nbytes, form = (kept.nbytes, str(kept.form)) if packed else (tensor.nbytes, "16")
            tensors.append(StoredTensor(name, nbytes, form, tensor.shape, tensor.dtype))
            if self._scaled(kept):
                width = tensor.matrix[1]
                tensors.append(StoredTensor(name + _SCALE, 4 * width, "16", (width,), "float32"))
        return tensors

    def _write(self, writer: Writer, rest: Mapping[str, KeptWeight], on_values: OnValues | None) -> None:
        for name, value in self.source.stream(self.model, only=rest.keys()):
            kept = rest[name]
            data, scale = self._bytes(kept, value)
            writer.put(name, data.view(torch.uint8))
            if scale is not None:
                writer.put(name + _SCALE, scale.float().cpu().contiguous().view(torch.uint8))
            if on_values is not None:
                on_values(kept.tensor.numel)

    def _bytes(self, kept: KeptWeight, value: Tensor | PackedMatrix) -> tuple[Tensor, Tensor | None]:
        if isinstance(value, PackedMatrix) or isinstance(kept.form, QuantSpec):
            return as_kept(kept, value, self.smoothing.get(kept.tensor.name))
        return value.to(getattr(torch, kept.tensor.dtype)).contiguous(), None


class LoadProgress:
    """Reports the progress of loading about once a second."""

    def __init__(self, spec: ModelSpec, report: OnProgress | None, requests: int, begin: float) -> None:
        self._total, self._report, self._requests = spec.num_parameters, report, requests
        self._begin = self._last = begin
        self.done = 0

    def add(self, values: int) -> None:
        """Count ``values`` more values as loaded."""
        self.done += values
        now = time.perf_counter()
        if self._report is not None and now - self._last > 1:
            self._last = now
            left = (now - self._begin) * (self._total - self.done) / max(self.done, 1)
            loaded = self.done / self._total
            self._report(CallProgress(0, self._requests, 0, 0, 0, now - self._begin, left, loaded=loaded))


def observed(on_progress: OnProgress | None, trace: Trace, ledger: ByteLedger) -> OnProgress | None:
    """The same callback, with each stream's busy seconds and each tier's bytes and limit added."""
    if on_progress is None:
        return None

    def report(state: CallProgress) -> None:
        held, limits = (
            {tier.value: count for tier, count in counts.copy().items()}
            for counts in (ledger.held, ledger.limits)
        )
        on_progress(replace(state, busy_seconds=trace.busy.copy(), held=held, limits=limits))

    return report


def in_own_files(
    source: Checkpoint | RandomWeights, model: LayeredModel, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Extent]:
    """The weights that a file has byte for byte as the model needs them, at an offset that torch can view."""
    extents = source.extents(model).items()
    return {name: extent for name, extent in extents if extent.offset % dtypes[name].itemsize == 0}
