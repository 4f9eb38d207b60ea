"""Group-wise 4-bit rounding written out with numpy, and a key-value cache that rounds what is past."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.models.adapter import LayeredModel
from engine.models.attention import AttentionBatch
from tests.support.engine_models import Expected

LEVELS = 15


def rounded(rows: Tensor, group_size: int = 64) -> Tensor:
    """What 4 bits keep of float rows [R, n]: minimum and scale of each group in fp16, codes 0 to 15."""
    values = rows.detach().float().numpy()
    out = np.empty_like(values)
    for start in range(0, values.shape[1], group_size):
        group = values[:, start : start + group_size]
        minimum = group.min(1, keepdims=True).astype(np.float16).astype(np.float32)
        span = np.maximum(group.max(1, keepdims=True) - minimum, 0)
        scale = (span / np.float32(LEVELS)).astype(np.float16).astype(np.float32)
        codes = np.clip(np.round((group - minimum) / np.where(scale > 0, scale, 1)), 0, LEVELS)
        out[:, start : start + group_size] = minimum + codes * scale
    return torch.from_numpy(out)


def error_bound(rows: Tensor, group_size: int = 64) -> Tensor:
    """The most that rounding may change each value of float64 rows [R, n].

    Half a step; the minimum and fifteen scales are rounded to fp16, whose precision is 2^-11 and
    whose smallest step is 2^-24; and arithmetic in float32.
    """
    bound = torch.empty_like(rows)
    for start in range(0, rows.shape[1], group_size):
        group = rows[:, start : start + group_size]
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        in_half = 2.0**-11 * low.abs() + 2.0**-25
        step = (high - low + in_half) / LEVELS
        slack = LEVELS * (2.0**-11 * step + 2.0**-25) + 2.0**-22 * torch.maximum(low.abs(), high.abs())
        bound[:, start : start + group_size] = step / 2 + in_half + slack
    return bound


class RoundedPast:
    """Keys and values of one sequence: fresh ones exact, past ones as 4 bits keep them."""

    def __init__(self, group_size: int = 64) -> None:
        self._past: dict[int, tuple[Tensor, Tensor]] = {}
        self._group_size = group_size
        self.layer = 0

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append fresh keys [T, G, D] and values [T, G, E]; return all of them."""
        past = self._past.get(self.layer)
        kept = tuple(
            rounded(part.reshape(len(part), -1), self._group_size).view(part.shape) for part in (key, value)
        )
        if past is None:
            self._past[self.layer] = kept[0], kept[1]
            return key, value
        self._past[self.layer] = torch.cat([past[0], kept[0]]), torch.cat([past[1], kept[1]])
        return torch.cat([past[0], key]), torch.cat([past[1], value])


@torch.inference_mode()
def with_rounded_past(
    model: LayeredModel, prompt: Sequence[int], new_tokens: int, group_size: int = 64
) -> Expected:
    """Greedy continuation of one prompt, layer by layer, over a KV cache whose past is kept at 4 bits."""
    cache = RoundedPast(group_size)
    fresh, done = list(prompt), 0
    tokens: list[int] = []
    logprobs: list[float] = []
    for _ in range(new_tokens):
        positions = torch.arange(done, done + len(fresh))[None]
        hidden, calls = model.embed(torch.tensor([fresh]), positions)
        for layer, call in enumerate(calls):
            cache.layer = layer
            hidden = model.run_layer(layer, hidden, call, AttentionBatch([len(fresh)], cache))
        scores = torch.log_softmax(model.head(hidden[:, -1:])[0].float(), dim=-1)
        done += len(fresh)
        fresh = [int(scores.argmax())]
        tokens.append(fresh[0])
        logprobs.append(float(scores[fresh[0]]))
    return Expected(tuple(tokens), tuple(logprobs), ())
