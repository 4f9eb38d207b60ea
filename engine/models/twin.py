"""The architecture check: a tiny random twin must answer as `transformers` does, or the model is refused.

Some architectures keep state outside attention (linear attention, state-space hybrids) or treat
attention in a way that packed tokens do not reproduce; they would give wrong answers without any
error. So before a family is trusted, a twin with its own config class, shrunk to a few layers of
each kind, runs through `LayeredModel` and through `transformers`, and both must agree: scoring,
and a few greedy tokens, on prompts of different lengths.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from engine.errors import UnsupportedModelError, first_line
from engine.kernels.backend import kernels_for
from engine.kernels.calls import AttentionCall
from engine.models.adapter import LayeredModel
from engine.models.attention import AttentionBatch
from engine.models.check.shrink import twin_config as twin_config
from engine.models.check.tiny import TooLargeError, tiny_model
from engine.models.decoder.parts import find_parts, name_of
from engine.models.decoder.ways import Way
from engine.models.describe import kv_widths
from engine.models.recurrent.mixers import mixers_of
from engine.models.recurrent.plain import PlainStates
from engine.spec.kv_format import KVFormat

TOLERANCE = 1e-4
"""Largest accepted difference of a log-probability in float32."""

_PROMPT_LENGTHS = (23, 3, 12)
_NEW_TOKENS = 5
_CHUNK = 8
"""Tokens of a prompt that recurrent layers compute at once, so that prompts have several chunks."""


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

    @property
    def has_past(self) -> bool:
        """Whether any layer has attended."""
        return bool(self._past)

    def widths(self, layer: int) -> tuple[int, int]:
        """Values per token of this layer's keys and values; none where it never attended."""
        if (layer, 0) not in self._past:
            return 0, 0
        key, value = self._past[layer, 0]
        return key[0].numel(), value[0].numel()


def check_architecture(config: PretrainedConfig) -> Way:
    """Refuse an architecture that the engine would answer wrongly; returns how its attention runs.

    The verdict is kept for this process only and can never be stale.

    Raises:
        UnsupportedModelError: naming the architecture and the reason.
    """
    try:
        twin = twin_config(config)
        key = type(twin), json.dumps(twin.to_dict(), sort_keys=True, default=str)
        if key not in _VERDICTS:
            _VERDICTS[key] = find_way(twin)
        verdict = _VERDICTS[key]
    except Exception as error:  # a config so unlike the others that it cannot be shrunk
        verdict = f"no small twin of it can be made: {_named(error)}"
    if isinstance(verdict, str):
        raise UnsupportedModelError(
            f"{name_of(config)} is refused: {verdict}; run it with transformers itself"
        )
    return verdict


_VERDICTS: dict[tuple[type, str], Way | str] = {}
"""How attention runs, or the reason why not, by a twin's config."""


def find_way(config: PretrainedConfig) -> Way | str:
    """The fastest way in which a small model of this config answers as `transformers`; or why none does."""
    reasons = []
    try:
        twin = Twin(config)
    except TooLargeError as error:
        return f"its twin cannot be made small: {error}"
    except Exception as error:  # whatever an unknown architecture raises is the reason to refuse it
        return f"its twin could not be built: {_named(error)}"
    for way in Way:
        reason = twin.compare(way)
        if not reason and (way is Way.PACKED or twin.caches_alike()):
            return way
        reason = reason or "transformers itself answers otherwise with its cache than without"
        reasons.append(reason)
    apart = next((reason for reason in reversed(reasons) if reason != reasons[0]), "")
    return twin.cause() or reasons[0] + (f"; sequence by sequence {apart}" if apart else "")


class Twin:
    """A small random model, and what `transformers` answers with it."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.model = tiny_model(config)
        generator = torch.Generator().manual_seed(1)
        self._prompts = [torch.randint(3, 100, (length,), generator=generator) for length in _PROMPT_LENGTHS]
        self._expected: list[tuple[list[int], Tensor]] | None = None

    def compare(self, way: Way) -> str:
        """Run it layer by layer; the first difference from transformers, or ''."""
        with torch.no_grad():
            try:
                self.model.set_attn_implementation("eager")
                expected = self._answers(find_parts(self.model).causal)
            except Exception as error:
                return f"transformers could not run its twin: {_named(error)}"
            try:
                self.model.set_attn_implementation(way.implementation)
                key_values = GrowingKeyValues()
                layered = LayeredModel(self.model, way=way)
                for mixer in mixers_of(layered.layers):
                    mixer.chunk = _CHUNK
                got = _walk(layered, self._prompts, key_values)
            except Exception as error:
                return f"its layers cannot be run one by one: {_named(error)}"
        if way is not Way.PACKED and not key_values.has_past:
            return "it keeps no keys and values of earlier tokens"
        for (tokens, scores), (other_tokens, other_scores) in zip(expected, got, strict=True):
            if not torch.isfinite(scores).all():
                return "its random twin gives no finite log-probabilities"
            difference = (scores - other_scores).abs().max().item()
            if not difference <= TOLERANCE or tokens != other_tokens:
                return (
                    f"run layer by layer its log-probabilities differ from transformers' by {difference:.2g}"
                )
        for layer, widths in enumerate(kv_widths(layered)):
            if (found := key_values.widths(layer)) != widths:
                return f"layer {layer} caches {found} values per token where {widths} were measured"
        return ""

    def caches_alike(self) -> bool:
        """Whether transformers' own generation, which keeps a cache, answers as its forwards without one."""
        self.model.set_attn_implementation("eager")
        config = self.model.generation_config
        config.eos_token_id = config.forced_eos_token_id = None
        for prompt, (_, expected) in zip(self._prompts, self._answers(self.model), strict=True):
            try:
                found = self.model.generate(
                    prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False,
                    max_new_tokens=1 + _NEW_TOKENS // 2, output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
            except Exception:  # it does not generate by itself
                return True
            scores = torch.log_softmax(torch.stack([step[0] for step in found.logits]).float(), dim=-1)
            if not (scores - expected[: len(scores)]).abs().max() <= TOLERANCE:
                return False
        return True

    def cause(self) -> str:
        """Why layers run one by one cannot answer as the whole model does, where it can be told."""
        if self.model.config.is_encoder_decoder and hasattr(self.model, "get_encoder"):
            return "it answers from an encoder's output (encoder-decoder)"
        try:
            with torch.inference_mode():
                self.model.set_attn_implementation("eager")
                prompt = self._prompts[0]
                long, short = (
                    self.model(input_ids=ids[None], use_cache=False).logits[0, 2]
                    for ids in (prompt, prompt[:-1])
                )
        except Exception:
            return ""
        if (long - short).abs().max() > TOLERANCE:
            return "its attention is not causal: later tokens change what earlier ones predict"
        return ""

    def _answers(self, causal: Any) -> list[tuple[list[int], Tensor]]:
        """What the model answers; its causal language model where a wrapper does not take text alone."""
        if self._expected is None:
            try:
                self._expected = [_greedy(self.model, prompt) for prompt in self._prompts]
            except Exception:
                if causal is self.model:
                    raise
                self._expected = [_greedy(causal, prompt) for prompt in self._prompts]
        return self._expected


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
    states = PlainStates(model.states, len(prompts))
    for _ in range(_NEW_TOKENS):
        lengths = [len(ids) for ids in fresh]
        ids = torch.tensor([[i for part in fresh for i in part]])
        positions = torch.cat([torch.arange(n, n + t) for n, t in zip(done, lengths, strict=True)])[None]
        hidden, calls = model.embed(ids, positions, lengths)
        states.lengths = lengths
        for layer, call in enumerate(calls):
            key_values.layer = states.layer = layer
            batch = AttentionBatch(lengths, key_values, begins=done)
            hidden = model.run_layer(layer, hidden, call, batch, states)
        states.has_past = True
        last = torch.tensor(lengths).cumsum(0) - 1
        scores = torch.log_softmax(model.head(hidden[:, last]).float(), dim=-1)
        done = [n + t for n, t in zip(done, lengths, strict=True)]
        fresh = [[int(row.argmax())] for row in scores]
        for (tokens, kept), new, row in zip(answers, fresh, scores, strict=True):
            tokens.extend(new)
            kept.append(row)
    return [(tokens, torch.stack(kept)) for tokens, kept in answers]


def _named(error: BaseException) -> str:
    if isinstance(error, UnsupportedModelError):
        return str(error).split(" is refused: ", 1)[-1]
    return f"{type(error).__name__}: {first_line(error)}"
