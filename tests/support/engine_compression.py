"""An oracle of compression: weights and KV cache rounded by the plain torch definition of the formats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels import reference
from engine.kernels.backend import kernels_for
from engine.models.adapter import LayeredModel
from engine.models.attention import AttentionBatch
from engine.spec.kv_format import KVFormat
from engine.spec.quant import QuantSpec
from tests.support.agreement import Expected


def rounded(matrix: Tensor, spec: QuantSpec) -> Tensor:
    """Float values [R, W] after packing and unpacking in a format, [R, W] float32."""
    values = matrix.detach().float().contiguous()
    packed = torch.empty(spec.blocks(len(values)), spec.block_bytes(values.shape[1]), dtype=torch.uint8)
    return reference.unpack(reference.pack(values, spec, packed), spec, torch.empty_like(values))


class RoundedPast:
    """The KV cache of one sequence as the engine should see it: packed tokens rounded, the newest exact."""

    form = None

    def __init__(self, kept: KVFormat | None) -> None:
        self._kept = self.form = kept
        self.kernels = kernels_for(torch.device("cpu"))
        self._past: dict[int, tuple[Tensor, Tensor]] = {}
        self.layer = 0

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append fresh keys [T, G, D] and values [T, G, E]; return all of them."""
        past = self._past.get(self.layer)
        if past is None:
            self._past[self.layer] = key.clone(), value.clone()
            return key, value
        forms = (self._kept.keys, self._kept.values) if self._kept else (None, None)
        seen = tuple(self._seen(old, spec) for old, spec in zip(past, forms, strict=True))
        self._past[self.layer] = torch.cat([past[0], key]), torch.cat([past[1], value])
        return torch.cat([seen[0], key]), torch.cat([seen[1], value])

    def decode(self, *fresh: object) -> bool:
        """Decline the fused decoding path, so that attention goes through `extend`."""
        return False

    def commit(self) -> None:
        pass

    def _seen(self, rows: Tensor, spec: QuantSpec | None) -> Tensor:
        packed = self._kept.packed_tokens(len(rows)) if self._kept else 0
        if not packed or spec is None:
            return rows
        flat = rounded(rows[:packed].reshape(packed, -1), spec).view(packed, *rows.shape[1:])
        return torch.cat([flat, rows[packed:]])


@torch.inference_mode()
def with_rounded_past(
    model: LayeredModel, prompt: Sequence[int], new_tokens: int, kept: KVFormat | None, fraction: float = 1.0
) -> Expected:
    """Greedy continuation of one prompt, layer by layer, over a KV cache whose older tokens are packed."""
    cache = RoundedPast(kept)
    fresh, done = list(prompt), 0
    tokens: list[int] = []
    logprobs: list[float] = []
    for _ in range(new_tokens):
        positions = torch.arange(done, done + len(fresh))[None]
        hidden, calls = model.embed(torch.tensor([fresh]), positions, [len(fresh)])
        for layer, call in enumerate(calls):
            cache.layer = layer
            hidden = model.run_layer(layer, hidden, call, AttentionBatch([len(fresh)], cache, fraction))
        scores = torch.log_softmax(model.head(hidden[:, -1:])[0].float(), dim=-1)
        done += len(fresh)
        fresh = [int(scores.argmax())]
        tokens.append(fresh[0])
        logprobs.append(float(scores[fresh[0]]))
    return Expected(tuple(tokens), tuple(logprobs), ())
