"""The architecture check: a tiny random twin must answer as `transformers` does, or the model is refused.

Some architectures keep state outside attention (linear attention, state-space hybrids) or treat
attention in a way that packed tokens do not reproduce; they would give wrong answers without any
error. So before a family is trusted, a twin with its own config class, shrunk to a few layers of
each kind, runs through `LayeredModel` and through `transformers`, and both must agree: scoring,
and a few greedy tokens, on prompts of different lengths.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from engine.errors import UnsupportedModelError, first_line
from engine.kernels.backend import kernels_for
from engine.kernels.calls import AttentionCall
from engine.models.adapter import LayeredModel
from engine.models.attention import ATTENTION_NAME, AttentionBatch
from engine.models.describe import kv_widths
from engine.spec.kv_format import KVFormat

TOLERANCE = 1e-4
"""Largest accepted difference of a log-probability in float32."""

_PROMPT_LENGTHS = (23, 3, 12)
_NEW_TOKENS = 5
_MAX_LAYERS = 4
_MOST_PARAMETERS = 20_000_000

_SMALL: dict[str, int] = {
    "vocab_size": 128, "hidden_size": 64, "d_model": 64, "n_embd": 64, "word_embed_proj_dim": 64,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48, "head_dim": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "sliding_window": 8, "attention_chunk_size": 8, "max_position_embeddings": 128, "n_positions": 128,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 8,
    "qk_head_dim": 32, "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Sizes of a twin, by the names that configs use; only those that a config has are set."""


class GrowingKeyValues:
    """The plainest key-value cache there is: one pair of growing tensors per sequence and layer."""

    form: KVFormat | None = None

    def __init__(self) -> None:
        self._past: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.layer = 0
        self.kernels = kernels_for(torch.device("cpu"))

    def extend(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append fresh keys [T, G, D] and values [T, G, E]; return all of them, [n, G, D] and [n, G, E]."""
        past = self._past.get((self.layer, index))
        if past is not None:
            key, value = torch.cat([past[0], key]), torch.cat([past[1], value])
        self._past[self.layer, index] = key, value
        return key, value

    def decode(self, call: AttentionCall) -> bool:
        return False  # one by one is plainer

    def commit(self) -> None:
        pass

    def widths(self, layer: int) -> tuple[int, int]:
        """Values per token of this layer's keys and values; none where it never attended."""
        if (layer, 0) not in self._past:
            return 0, 0
        key, value = self._past[layer, 0]
        return key[0].numel(), value[0].numel()


def check_architecture(config: PretrainedConfig) -> None:
    """Refuse an architecture that the engine would answer wrongly.

    It takes a twentieth of a second, so the verdict is kept for this process only and can never be stale.

    Raises:
        UnsupportedModelError: naming the architecture and the reason.
    """
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    try:
        twin = twin_config(config)
        kind: Any = type(twin)
        reason = _verdict(kind, json.dumps(twin.to_dict(), sort_keys=True, default=str))
    except Exception as error:  # a config so unlike the others that it cannot be shrunk
        reason = f"no small twin of it can be made: {_named(error)}"
    if reason:
        raise UnsupportedModelError(f"{name} is refused: {reason}; run it with transformers itself")


def twin_config(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the same class and features with a few small layers of each kind."""
    twin = copy.deepcopy(config.get_text_config())
    heads = int(getattr(twin, "num_attention_heads", 4) or 4)
    groups = int(getattr(twin, "num_key_value_heads", heads) or heads)
    small = dict(_SMALL)
    small["num_attention_heads"] = 4
    small["num_key_value_heads"] = 4 if groups == heads else 1 if groups == 1 else 2
    for wide in ("word_embed_proj_dim", "embedding_size"):  # a narrower embedding stays narrower
        if getattr(twin, wide, None) not in (None, getattr(twin, "hidden_size", None)):
            small[wide] = 32
    for key, value in small.items():
        if getattr(twin, key, None) is not None:
            setattr(twin, key, value)
    for key, cap in (("attn_logit_softcapping", 2.0), ("final_logit_softcapping", 5.0)):
        if getattr(twin, key, None):  # low enough for a small random model's scores to reach it
            setattr(twin, key, cap)
    if getattr(twin, "pad_token_id", None) is None:
        twin.pad_token_id = 0
    _shrink_rope(twin)
    _pick_layers(twin)
    twin._attn_implementation = None
    return twin


def _shrink_rope(twin: Any) -> None:
    """Keep per-dimension rope factors as long as the twin's rotary dimension."""
    rope = getattr(twin, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    head = getattr(twin, "head_dim", None) or twin.hidden_size // twin.num_attention_heads
    usual = getattr(twin, "partial_rotary_factor", 1.0)
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        for key in ("short_factor", "long_factor"):
            if isinstance(parameters.get(key), list):
                fraction = parameters.get("partial_rotary_factor", usual) or 1.0
                parameters[key] = parameters[key][: int(head * fraction) // 2]
        if "original_max_position_embeddings" in parameters:
            parameters["original_max_position_embeddings"] = 64


def _pick_layers(twin: Any) -> None:
    """Cut to a few layers that show every kind the model has, in order of first appearance."""
    count = int(twin.num_hidden_layers)
    listed = {key: value for key, value in vars(twin).items() if key.endswith(("_types", "_type", "_layers"))}
    columns = [
        key
        for key, value in listed.items()
        if isinstance(value, list | tuple) and len(value) == count and count > 1
    ]
    if not columns:
        twin.num_hidden_layers = min(count, 2)
        if getattr(twin, "first_k_dense_replace", 0):
            twin.first_k_dense_replace = 1
        return
    rows = list(zip(*(getattr(twin, key) for key in columns), strict=True))
    kinds = [rows.index(row) for row in dict.fromkeys(rows)]
    others = [i for i in range(count) if i not in kinds]
    chosen = sorted([*kinds, *others][: max(2, min(len(kinds), _MAX_LAYERS))])
    for key in columns:
        setattr(twin, key, [getattr(twin, key)[i] for i in chosen])
    twin.num_hidden_layers = len(chosen)


@cache
def _verdict(config_class: type[PretrainedConfig], twin_json: str) -> str:
    """Empty if the architecture is answered correctly, otherwise the reason why not."""
    return compare_with_transformers(config_class.from_dict(json.loads(twin_json)))


def compare_with_transformers(config: PretrainedConfig) -> str:
    """Run a small random model of this config both ways; returns the first difference, or ''."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with init_empty_weights():
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > _MOST_PARAMETERS:
                return f"its twin cannot be made small: {size:,} parameters"
            reference = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", dtype=torch.float32
            ).eval()
            for parameter in reference.parameters():  # far enough from zero that an error shows
                if parameter.dim() > 1:
                    parameter.data.normal_(0, 0.08)
            generator = torch.Generator().manual_seed(1)
            prompts = [torch.randint(3, 100, (length,), generator=generator) for length in _PROMPT_LENGTHS]
    except Exception as error:  # whatever an unknown architecture raises is the reason to refuse it
        return f"its twin could not be built: {_named(error)}"
    with torch.inference_mode():
        try:
            expected = [_greedy(reference, prompt) for prompt in prompts]
        except Exception as error:
            return f"transformers could not run its twin: {_named(error)}"
        try:
            reference.set_attn_implementation(ATTENTION_NAME)
            key_values = GrowingKeyValues()
            got = _walk(LayeredModel(reference), prompts, key_values)
        except Exception as error:
            return f"its layers cannot be run one by one: {_named(error)}"
    for (tokens, scores), (other_tokens, other_scores) in zip(expected, got, strict=True):
        if not torch.isfinite(scores).all():
            return "its random twin gives no finite log-probabilities"
        difference = (scores - other_scores).abs().max().item()
        if difference > TOLERANCE or tokens != other_tokens:
            return (
                f"run layer by layer its log-probabilities differ from transformers' by {difference:.2g}, "
                "as happens where state is kept outside of attention or attention has no interface"
            )
    for layer, expected_widths in enumerate(kv_widths(config)):
        widths = key_values.widths(layer)
        if widths != expected_widths:
            return f"layer {layer} caches {widths} values per token, its config says {expected_widths}"
    return ""


def _greedy(model: Any, prompt: Tensor) -> tuple[list[int], Tensor]:
    """Greedy continuation by full forwards without a cache: tokens, and distributions [_NEW_TOKENS, V]."""
    ids, scores = prompt.tolist(), []
    for _ in range(_NEW_TOKENS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        scores.append(torch.log_softmax(logits[-1].float(), dim=-1))
        ids.append(int(scores[-1].argmax()))
    return ids[len(prompt) :], torch.stack(scores)


def _walk(
    model: LayeredModel, prompts: list[Tensor], key_values: GrowingKeyValues
) -> list[tuple[list[int], Tensor]]:
    """The same continuation, layer by layer over packed tokens with a key-value cache."""
    fresh, done = [prompt.tolist() for prompt in prompts], [0] * len(prompts)
    answers: list[tuple[list[int], list[Tensor]]] = [([], []) for _ in prompts]
    for _ in range(_NEW_TOKENS):
        lengths = [len(ids) for ids in fresh]
        ids = torch.tensor([[i for part in fresh for i in part]])
        positions = torch.cat([torch.arange(n, n + t) for n, t in zip(done, lengths, strict=True)])[None]
        hidden, calls = model.embed(ids, positions)
        for layer, call in enumerate(calls):
            key_values.layer = layer
            hidden = model.run_layer(layer, hidden, call, AttentionBatch(lengths, key_values))
        last = torch.tensor(lengths).cumsum(0) - 1
        scores = torch.log_softmax(model.head(hidden[:, last]).float(), dim=-1)
        done = [n + t for n, t in zip(done, lengths, strict=True)]
        fresh = [[int(row.argmax())] for row in scores]
        for (tokens, kept), new, row in zip(answers, fresh, scores, strict=True):
            tokens.extend(new)
            kept.append(row)
    return [(tokens, torch.stack(kept)) for tokens, kept in answers]


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
