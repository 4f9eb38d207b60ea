"""A small random model of a config, with weights for its text decoder alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from engine.errors import UnsupportedModelError
from engine.models.adapter import LayeredModel
from engine.models.decoder.build import build, is_shown, show_rest
from engine.models.decoder.parts import text_config
from engine.models.decoder.ways import Way

_MOST_PARAMETERS = 20_000_000


class TooLargeError(Exception):
    """A model cannot be made small."""


def tiny_model(config: PretrainedConfig, seed: int = 0) -> Any:
    """A float32 model of this config with eager attention; parts of a wrapper other than text stay empty.

    Matrices are drawn with a deviation of 0.08, four times transformers' own, so that logits differ enough
    for an error to change them visibly.

    Raises:
        TooLargeError: if its text decoder has more than a few million parameters.
        Exception: whatever an unknown architecture raises in `transformers`.
    """
    model = build(config, torch.float32, "eager", empty=True)
    text = _text_tensors(config, model)
    size = sum(tensor.numel() for tensor in text.values())
    if size > _MOST_PARAMETERS:
        raise TooLargeError(f"{size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not _is_wrapper(model):
            model = build(config, torch.float32, "eager")
        for name, tensor in text.items():
            _fill(model, name, tensor)
        model.tie_weights()
    show_rest(model, text, torch.device("cpu"))
    return model.eval()


def text_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a model of `tiny_model` that have weights, by their names in its state dict."""
    return {name: tensor for name, tensor in model.state_dict().items() if not is_shown(tensor)}


def _is_wrapper(model: Any) -> bool:
    return text_config(model.config) is not model.config


def _text_tensors(config: PretrainedConfig, model: Any) -> dict[str, Tensor]:
    """Names and shapes of what text needs of an empty model."""
    state: dict[str, Tensor] = model.state_dict()
    if not _is_wrapper(model):
        return state
    failure: UnsupportedModelError | None = None
    for way in Way:
        try:
            layered = LayeredModel.empty(config, torch.float32, way=way)
        except UnsupportedModelError as error:
            failure = failure or error
            continue
        return {name: state[name] for names in layered.stage_tensors for name in names}
    assert failure is not None
    raise failure


def _fill(model: Any, name: str, like: Tensor) -> None:
    """Give a tensor random values, far enough from zero that an error shows."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    value = module._parameters.get(leaf)
    if value is None:
        if "correction_bias" in leaf:
            module._buffers[leaf].normal_(0, 0.05)
    elif value.dim() > 1:
        module._parameters[leaf] = nn.Parameter(torch.empty(like.shape).normal_(0, 0.08), requires_grad=False)
    elif value.is_meta:
        mean = 1.0 if leaf == "weight" else 0.0
        module._parameters[leaf] = nn.Parameter(
            torch.empty(like.shape).normal_(mean, 0.05), requires_grad=False
        )
    else:
        value.data.add_(torch.empty(like.shape).normal_(0, 0.05))
