"""Models of any config, empty or with weights: the class that `transformers` has for it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
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
    config = copy.deepcopy(config)  # the implementation is noted in it
    failure: Exception | None = None
    for auto in classes or [AutoModelForCausalLM]:
        try:
            with init_empty_weights(include_buffers=False) if empty else nullcontext():
                return auto.from_config(
                    config, attn_implementation=attention, dtype=dtype, trust_remote_code=trust_remote_code
                ).eval()
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _classes(auto: Any, config: PretrainedConfig) -> tuple[type, ...]:
    """The classes of a config's type that an automatic class chooses from."""
    found = auto._model_mapping[type(config)]
    return found if isinstance(found, tuple) else (found,)
