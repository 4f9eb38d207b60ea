"""Models of any config, empty or with weights: the class that `transformers` has for it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
)

_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""A causal language model before a wrapper of several modalities."""


def build(
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool = False,
    empty: bool = False,
) -> Any:
    """A model of this config.

    That of several classes that the config names is built; without a name, a causal language model for the
    text part alone before a wrapper.

    Args:
        attention: name of the attention implementation.
        empty: with its parameters on the meta device; computed buffers are real.

    Raises:
        Exception: whatever an unknown architecture or an impossible size raises in `transformers`.
    """
    classes = [auto for auto in _CLASSES if type(config) in auto._model_mapping]
    if not classes and not getattr(config, "auto_map", None):
        raise ValueError(f"transformers has no causal language model of type {config.model_type!r}")
    names = getattr(config, "architectures", None) or ()
    classes.sort(key=lambda auto: not any(found.__name__ in names for found in _classes(auto, config)))
    failure: Exception | None = None
    for auto, chosen in itertools.product(
        classes or [AutoModelForCausalLM], _implementations(config, attention)
    ):
        try:
            with init_empty_weights(include_buffers=False) if empty else nullcontext():
                return auto.from_config(
                    copy.deepcopy(config),  # the implementation is noted in it
                    attn_implementation=chosen, dtype=dtype, trust_remote_code=trust_remote_code,
                ).eval()  # fmt: skip
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _implementations(config: PretrainedConfig, attention: str) -> list[Any]:
    """The attention implementation for all of a model; where some tower lacks it, for its text part alone."""
    text = config.get_text_config()
    parts = {
        name: attention if getattr(config, name, None) is text else "eager" for name in config.sub_configs
    }
    return (
        [attention, {"": "eager", **parts}]
        if text is not config and attention in parts.values()
        else [attention]
    )


def _classes(auto: Any, config: PretrainedConfig) -> tuple[type, ...]:
    """The classes of a config's type that an automatic class chooses from."""
    found = auto._model_mapping[type(config)]
    return found if isinstance(found, tuple) else (found,)


def show_rest(model: nn.Module, text: Collection[str], device: torch.device) -> None:
    """Give all other parameters than those of some names zeros that take no memory.

    Wrappers look at the device and the kind of number of the first parameter that they have.
    """
    for owner, module in model.named_modules():
        for leaf, value in module._parameters.items():
            name = f"{owner}.{leaf}" if owner else leaf
            if value is None or name in text or (value.device == device and not value.is_meta):
                continue
            zeros = torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)
            module._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)


def is_shown(tensor: Tensor) -> bool:
    """Whether a tensor [...] is one that `show_rest` made."""
    return bool(tensor.numel()) and tensor.dim() > 0 and not any(tensor.stride())
