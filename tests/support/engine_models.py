"""Tiny random models of many families, and the answers of plain `transformers` with them.

The oracle is as simple as possible: one prompt at a time, and a full forward without a cache per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, OPTConfig, PretrainedConfig

from engine.families import default_config
from engine.models.check.tiny import text_state
from engine.models.check.tiny import tiny_model as tiny_model
from engine.models.decoder.parts import find_parts
from engine.models.twin import twin_config
from tests.support.agreement import Expected

NEW_TOKENS = 5

PROMPT_LENGTHS = (17, 3, 1, 9, 25, 4, 30, 2)
"""Unsorted, with a single token, and some longer than the sliding window of 8 tokens in `twin_config`."""

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    name: CONFIG_MAPPING[name]
    for name in (
        "opt", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi",
        "phi3", "gpt2", "gpt_neox", "olmo2", "starcoder2", "gpt_oss", "gpt_bigcode", "granite", "cohere2",
        "deepseek_v3",
    )
}  # fmt: skip
FAMILIES["opt_projected"] = lambda: OPTConfig(
    hidden_size=1024, word_embed_proj_dim=512, do_layer_norm_before=False
)
"""Name -> full-size config, which `twin_config` shrinks."""


@dataclass
class Family:
    """A random model in memory and on disk, with the answers that the engine must give."""

    name: str
    folder: Path
    model: Any

    @cached_property
    def expected(self) -> list[Expected]:
        """Answers to `prompts`, `NEW_TOKENS` each."""
        return [full_forwards(self.model, prompt, NEW_TOKENS) for prompt in prompts()]


def prompts(lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 1) -> list[tuple[int, ...]]:
    """Random prompts of ids 3 to 99, which are above the special tokens and in every vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, 100, (length,), generator=generator).tolist()) for length in lengths]


def make_family(name: str, folder: Path) -> Family:
    """Build a family's tiny model and save it with `save_pretrained`."""
    config = twin_config(FAMILIES[name]() if name in FAMILIES else default_config(name))
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap, None) is not None:
            setattr(config, cap, 2.0)  # near what random weights yield, so that it shows
    model = tiny_model(config)
    model.save_pretrained(folder, state_dict=text_state(model))
    takes = inspect.signature(model.forward).parameters
    alone = "pixel_values" not in takes or takes["pixel_values"].default is None
    return Family(name, folder, model if alone else find_parts(model).causal)


@torch.inference_mode()
def full_forwards(model: Any, prompt: Sequence[int], new_tokens: int) -> Expected:
    """Greedy tokens, their log-probabilities and the prompt's, by full forwards without a cache."""
    ids, logprobs = list(prompt), []
    device = next(model.parameters()).device
    for _ in range(new_tokens):
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1]
        scores = torch.log_softmax(logits.float(), dim=-1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores[ids[-1]]))
    logits = model(input_ids=torch.tensor([list(prompt)], device=device), use_cache=False).logits[0]
    scores = torch.log_softmax(logits.float(), dim=-1)
    return Expected(
        tokens=tuple(ids[len(prompt) :]),
        logprobs=tuple(logprobs),
        prompt_logprobs=tuple(float(scores[i, prompt[i + 1]]) for i in range(len(prompt) - 1)),
    )
