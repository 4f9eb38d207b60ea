"""Where the text decoder is in a `transformers` model: its layers, base model and head.

A wrapper of several modalities holds one decoder beside its other parts; all are found by structure, so that
nothing of a model family is written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from engine.errors import UnsupportedModelError

_LISTS = ("layers", "h", "blocks", "block", "layer")
"""Names of the module list of decoder layers."""

LAYER_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "num_layers")
"""Names of the number of decoder layers; of an encoder's decoder before others."""


@dataclass(frozen=True)
class Parts:
    """A model's text decoder."""

    causal: nn.Module
    """Turns hidden states into logits: the model itself, or a causal language model inside a wrapper."""

    causal_name: str
    """Its name in the model; empty for the model itself."""

    base: nn.Module
    """The child of ``causal`` that embeds tokens and runs the layers."""

    base_name: str
    """Its attribute in ``causal``."""

    owner: nn.Module
    """The module that has the list of layers."""

    owner_name: str
    """Its name in the model."""

    list_name: str
    """The list's attribute in ``owner``."""

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        found: nn.ModuleList = getattr(self.owner, self.list_name)
        return found

    @property
    def layers_name(self) -> str:
        """The list's name in the model."""
        return joined(self.owner_name, self.list_name)

    @property
    def base_path(self) -> str:
        """The base model's name in the model."""
        return joined(self.causal_name, self.base_name)


def joined(owner: str, name: str) -> str:
    """A child's name from its owner's, which is empty for the model itself."""
    return f"{owner}.{name}" if owner else name


def text_config(config: PretrainedConfig) -> Any:
    """The part of a config that describes the text decoder."""
    return config.get_text_config()


def name_of(config: PretrainedConfig) -> str:
    """What a refusal calls a model of this config."""
    return str((getattr(config, "architectures", None) or [type(config).__name__])[0])


def find_parts(model: nn.Module) -> Parts:
    """Find the text decoder of a model.

    Raises:
        UnsupportedModelError: if there is none that runs apart from the rest.
    """
    modules = dict(model.named_modules())
    owner_name, list_name = _find_layers(model, modules)
    causal_name = _find_causal(modules, owner_name)
    inside = owner_name.removeprefix(causal_name).removeprefix(".")
    if not inside:
        raise UnsupportedModelError(f"{type(model).__name__} is refused: it has no separate base model")
    base_name = inside.split(".", 1)[0]
    causal = modules[causal_name]
    return Parts(
        causal, causal_name, getattr(causal, base_name), base_name, modules[owner_name], owner_name, list_name
    )


def _find_layers(model: Any, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """The list of decoder layers: its owner's name and its own.

    Wanted is one as long as the config says, in a module of the text decoder's own config before others.
    """
    text = text_config(model.config)
    wanted = [count for name in LAYER_COUNTS if isinstance(count := getattr(text, name, None), int)]
    found = [
        (name, child)
        for count in dict.fromkeys(wanted)
        for name, module in modules.items()
        for child in _LISTS
        if isinstance(layers := module._modules.get(child), nn.ModuleList) and len(layers) == count
    ]
    counts = " or ".join(map(str, dict.fromkeys(wanted)))
    own = [pair for pair in found if type(getattr(modules[pair[0]], "config", None)) is type(text)]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} is refused: no list of {counts} decoder layers was found in it"
        )
    return (own or found)[0]


def _find_causal(modules: dict[str, nn.Module], owner: str) -> str:
    """The innermost model around the layers that has an output embedding; else the whole one."""
    for name in _ancestors(owner):
        module = modules[name]
        if isinstance(module, PreTrainedModel) and _has_output(module):
            return name
    return ""


def _has_output(module: PreTrainedModel) -> bool:
    try:
        return module.get_output_embeddings() is not None
    except (AttributeError, NotImplementedError):
        return False


def _ancestors(name: str) -> Iterator[str]:
    """A module's name and those of the modules around it, the innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""
