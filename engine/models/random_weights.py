"""Weights of the right shapes without a checkpoint, for measuring speed where answers do not matter.

Values are made at the speed of memory and depend on the seed, the tensor's name and the value's index alone,
so that any part of a tensor can be made without the rest: a model of any size is never whole in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from engine.kernels import random
from engine.models.adapter import LayeredModel
from engine.models.decoder.parts import text_config
from engine.spec.extent import Extent
from engine.spec.quant import QuantSpec


class RandomWeights:
    """Nearly normal matrices, norms of one, biases of zero.

    Attributes:
        digest: identifies config, seed and generator.
        kind: "random".
    """

    kind = "random"

    def __init__(self, config: PretrainedConfig, seed: int = 0) -> None:
        self.seed = seed
        text = text_config(config)
        self._dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float16
        self._std = float(getattr(text, "initializer_range", None) or 0.02)
        described = json.dumps(config.to_dict(), sort_keys=True, default=str)
        named = f"generator {random.VERSION}, seed {seed}, {described}"
        self.digest = f"random-sha256:{hashlib.sha256(named.encode()).hexdigest()}"

    def dtypes(self, model: LayeredModel) -> dict[str, torch.dtype]:
        """One kind of number for all tensors: the config's."""
        return {name: self._dtype for names in model.stage_tensors for name in names}

    def ties_hold(self, model: LayeredModel) -> bool:
        """Whether the config's ties hold: random weights follow them."""
        return True

    def packed_formats(self, model: LayeredModel) -> dict[str, QuantSpec]:
        """Nothing is packed before it is made."""
        return {}

    def left_out(self, model: LayeredModel) -> Mapping[str, int]:
        """Nothing is made that is not needed."""
        return {}

    def extents(self, model: LayeredModel) -> dict[str, Extent]:
        """Nothing lies in a file before it is made."""
        return {}

    def stream(
        self, model: LayeredModel, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (canonical name, tensor) of every tensor, or of those in ``only``, each once."""
        for name, shape in self._shapes(model, only):
            yield name, self._part(name, shape, 0, torch.empty(shape, dtype=self._dtype))

    def pieces(
        self, model: LayeredModel, values: int, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, int, Tensor]]:
        """What `stream` yields, in order, in parts of at most ``values`` values.

        Yields:
            Canonical name, index of the part's first value, and the part, flat, valid until the next one.
        """
        buffer = torch.empty(values, dtype=self._dtype)
        for name, shape in self._shapes(model, only):
            for start in range(0, shape.numel(), values):
                part = buffer[: min(values, shape.numel() - start)]
                yield name, start, self._part(name, shape, start, part)

    def fill(self, name: str, start: int, out: Tensor) -> Tensor:
        """Write values ``start`` to ``start + out.numel()`` of the matrix of that name, counted row by row.

        Args:
            out: [...] contiguous, on the CPU. Another kind of number than the config's has other roundings.
        """
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return random.fill(int.from_bytes(digest[:8], "little"), start, out, self._std)

    def _shapes(self, model: LayeredModel, only: Collection[str] | None) -> Iterator[tuple[str, torch.Size]]:
        state = model.model.state_dict()
        for name in dict.fromkeys(name for names in model.stage_tensors for name in names):
            if only is None or name in only:
                yield name, state[name].shape

    def _part(self, name: str, shape: torch.Size, start: int, out: Tensor) -> Tensor:
        if len(shape) > 1:
            return self.fill(name, start, out)
        return out.fill_(1 if name.endswith("weight") else 0)
