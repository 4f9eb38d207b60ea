"""Brings a model's weights in: which files hold them already as they are kept, what has to be made first.

Numbers that stay as the checkpoint has them are read from its own files, in place. What is packed,
fused or converted is written to the packed store once and read from there by this and later runs.
Without a file on disk to serve, random weights are made in memory and never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels.calls import PackedMatrix
from engine.memory.packing import as_kept
from engine.memory.smoothing import Smoothing
from engine.memory.store import Entry, PackedStore, StoredTensor, entry_key
from engine.memory.weights import WeightStore
from engine.models.adapter import LayeredModel
from engine.models.checkpoint import Checkpoint, RandomWeights
from engine.spec.extent import Extent
from engine.spec.hardware import Tier
from engine.spec.layout import KeptWeight, MemoryPlan
from engine.spec.model import DTYPE_BYTES, ModelSpec

OnTensor = Callable[[int], None]
"""Called with the number of values of every weight that is in place."""

_SCALE = "#input_scale"
"""Ends the name under which the store keeps what divides a weight's activations."""


@dataclass(frozen=True)
class _Packing:
    """What an entry of the store holds: every weight that the checkpoint's files do not hold as it is kept."""

    kept: Mapping[str, KeptWeight]
    smoothing: Mapping[str, Smoothing]

    def forms(self) -> dict[str, str]:
        """How each weight is written."""
        return {name: str(kept.form or kept.tensor.dtype) for name, kept in self.kept.items()}

    def tensors(self) -> Iterator[StoredTensor]:
        """What an entry has to have room for."""
        for name, kept in self.kept.items():
            plain = kept.form is None
            nbytes = kept.tensor.nbytes if plain else kept.nbytes
            yield StoredTensor(name, nbytes, self.forms()[name], kept.tensor.shape)
            if self.scaled(name):
                width = kept.tensor.matrix[1]
                yield StoredTensor(name + _SCALE, 4 * width, "float32", (width,))

    def scaled(self, name: str) -> bool:
        """Whether outliers are moved into a weight."""
        form = self.kept[name].form
        return name in self.smoothing and form is not None and form.activation_bits != 16
