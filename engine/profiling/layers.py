"""Times of a layer besides products and attention, of the head besides its product, of unpacking weights.

Layers of `transformers` are run through the engine's own adapter, with linear modules and attention that do
nothing. Knows OPT's layers alone: the norms, rotations and activations of others are assumed to take as long.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import OPTConfig

from engine.kernels.backend import Kernels, kernels_for
from engine.kernels.calls import AttentionCall, CachedSequence, Computable, PackedMatrix
from engine.models.adapter import LayeredModel
from engine.models.attention import AttentionBatch
from engine.profiling.products import make_weight
from engine.profiling.timing import Timing, timed
from engine.runtime.sampling import log_probabilities
from engine.spec.kv_format import KVFormat
from engine.units import MIB

TOKENS = (16, 64, 256, 1024)
WIDTHS = (256, 768, 2048)
"""Hidden sizes."""

LOGITS = (1, 8, 64)
VOCABULARY = 50_272


class _NoAttention:
    """A `KeyValues` whose attention is zeros, so that a layer's other work is timed alone."""

    form: KVFormat | None = None

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | CachedSequence:
        return key, value

    def decode(self, call: AttentionCall) -> bool:
        call.out.zero_()
        return True

    def commit(self) -> None:
        return None


def config_of(hidden: int, layers: int = 1, vocabulary: int = 512) -> OPTConfig:
    """An OPT of any width."""
    return OPTConfig(
        num_hidden_layers=layers, hidden_size=hidden, ffn_dim=4 * hidden, word_embed_proj_dim=hidden,
        num_attention_heads=max(1, hidden // 64), vocab_size=vocabulary, max_position_embeddings=2048,
        dtype="float16", architectures=["OPTForCausalLM"],
    )  # fmt: skip


class _Still(nn.Module):
    """In place of a linear module: returns numbers made beforehand."""

    def __init__(self, outputs: int, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._ready = torch.full((1, tokens, outputs), 0.1, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self._ready


@torch.inference_mode()
def measure_elementwise(
    device: torch.device, dtype: torch.dtype, seconds: float, tokens: Sequence[int] = TOKENS,
    widths: Sequence[int] = WIDTHS,
) -> dict[tuple[int, int], Timing]:  # fmt: skip
    """Seconds of a layer whose products and attention take none, by (tokens, hidden size)."""
    found = {}
    share = seconds / (len(tokens) * len(widths))
    for width, count in itertools.product(widths, tokens):
        model = LayeredModel.empty(config_of(width), dtype).to(device)
        for stage in (0, 1):
            _fill(model, stage, device, dtype)
        ids = torch.ones(1, count, dtype=torch.long, device=device)
        hidden, calls = model.embed(ids, torch.zeros_like(ids), [1] * count)
        batch = AttentionBatch([1] * count, _NoAttention(kernels_for(device)))
        _still(model.layers[0], count, device, dtype)
        found[count, width] = timed(partial(model.run_layer, 0, hidden, calls[0], batch), share, device)
    return found


def _still(layer: nn.Module, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    """Replace a layer's linear modules by ones that do nothing."""
    for parent in list(layer.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Linear):
                setattr(parent, name, _Still(module.out_features, tokens, device, dtype))


def _fill(model: LayeredModel, stage: int, device: torch.device, dtype: torch.dtype) -> None:
    """Put a stage's vectors and tables in place; matrices of layers have shapes alone, on the meta device."""
    tensors: dict[str, Computable] = {}
    state = model.model.state_dict()
    for name in model.stage_tensors[stage]:
        shape = tuple(state[name].shape)
        where = torch.device("meta") if stage and len(shape) == 2 else device
        tensors[name] = torch.full(shape, 0.01, dtype=dtype, device=where)
    model.places(stage, tensors).fill()


@torch.inference_mode()
def measure_logits(
    device: torch.device, dtype: torch.dtype, seconds: float, rows: Sequence[int] = LOGITS
) -> dict[int, Timing]:
    """Seconds from logits to chosen tokens and their log-probabilities, by rows of `VOCABULARY` logits."""
    kernels = kernels_for(device)

    def choose(logits: Tensor) -> None:
        places, lse = kernels.summarise(logits)
        targets = torch.tensor(places.tolist(), device=logits.device)
        log_probabilities(logits, targets, lse).tolist()

    logits = {count: torch.randn(count, VOCABULARY).to(device, dtype) for count in rows}
    return {count: timed(partial(choose, logits[count]), seconds / len(rows), device) for count in rows}


@torch.inference_mode()
def measure_unpack(
    device: torch.device, dtype: torch.dtype, form: str, seconds: float, shapes: Sequence[tuple[int, int]]
) -> dict[int, Timing]:
    """Seconds to unpack or convert a weight to what is computed in, by its number of values."""
    found, kernels = {}, kernels_for(device)
    for outputs, inputs in shapes:
        weight = make_weight(form, outputs, inputs, device)
        exact = torch.empty(outputs, inputs, dtype=dtype, device=device)
        unpack: Callable[[], object] = (
            partial(kernels.unpack, weight.data, weight.spec, exact)
            if isinstance(weight, PackedMatrix)
            else partial(exact.copy_, weight)
        )
        found[outputs * inputs] = timed(unpack, seconds / len(shapes), device)
    return found


def measure_memory(device: torch.device, seconds: float, size: int = 256 * MIB) -> Timing:
    """Seconds in which ``size`` bytes are read from a device's memory, by whatever is fastest at it."""
    values = torch.ones(size // 4, device=device)
    ways: list[Callable[[], object]] = [values.sum, values.amax, lambda: torch.dot(values, values)]
    timings = [timed(way, seconds / len(ways), device) for way in ways]
    return min(timings, key=lambda timing: timing.seconds)
