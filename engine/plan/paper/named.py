"""Models and machines that are known by name, as data that ships with the program.

Models: those of the OPT family (Zhang et al. 2022, table 1), as configs with the fields of `transformers`,
and their tensors, counted without torch. Machines: hardware profiles from published figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from engine.errors import ModelError, ProfileError
from engine.files.documents import parse_json
from engine.spec.model import ModelSpec, TensorSpec
from engine.spec.profile import HardwareProfile

_POSITION_OFFSET = 2
"""OPT's table of positions begins with two rows that no token uses."""


def config_names() -> list[str]:
    """All models, from the smallest to the largest."""
    return sorted(_names("configs"), key=_size)


def named_config(name: str) -> dict[str, Any]:
    """The config of a model, as a ``config.json`` of `transformers` holds it.

    Args:
        name: for instance ``opt-30b`` or ``facebook/opt-30b``.

    Raises:
        ModelError: if no model is called so.
    """
    if not is_named(name):
        raise ModelError(f"no model is called {name!r}: use one of {', '.join(config_names())}")
    config: dict[str, Any] = _content("configs", _short(name))
    return config


def is_named(name: str) -> bool:
    """Whether a config of that name ships with the program."""
    return _short(name) in config_names()


def opt_spec(name: str, compute_dtype: str = "float16") -> ModelSpec:
    """A model of the OPT family as `engine.models.describe` would have it, with random weights.

    Raises:
        ModelError: if no model is called so, or it is opt-350m, whose layers end in their norms.
    """
    config = named_config(name)
    if not config["do_layer_norm_before"]:
        raise ModelError(f"{name} cannot be counted by hand: its embeddings are projected")
    return spec_of_opt(config, _short(name), compute_dtype)


def spec_of_opt(config: Mapping[str, Any], name: str, compute_dtype: str) -> ModelSpec:
    """The same from a config."""
    hidden, inner, vocab = config["hidden_size"], config["ffn_dim"], config["vocab_size"]
    layers, positions = config["num_hidden_layers"], config["max_position_embeddings"]
    dtype = config["torch_dtype"]
    tensors: dict[str, TensorSpec] = {}

    def add(tensor: str, *shape: int, layer: bool = False, table: bool = False, fused: bool = True) -> str:
        matrix = len(shape) > 1
        tensors.setdefault(
            tensor,
            TensorSpec(tensor, shape, dtype, layer and matrix, fused=matrix and fused, table=table),
        )
        return tensor

    embedding = [
        add("model.decoder.embed_tokens.weight", vocab, hidden, table=True),
        add("model.decoder.embed_positions.weight", positions + _POSITION_OFFSET, hidden, fused=False),
    ]
    stages: list[tuple[str, ...]] = [tuple(embedding)]
    for index in range(layers):
        prefix, names = f"model.decoder.layers.{index}.", []
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            names.append(add(f"{prefix}self_attn.{part}.weight", hidden, hidden, layer=True))
            names.append(add(f"{prefix}self_attn.{part}.bias", hidden))
        for kind in ("weight", "bias"):
            names.append(add(f"{prefix}self_attn_layer_norm.{kind}", hidden))
        for part, shape in (("fc1", (inner, hidden)), ("fc2", (hidden, inner))):
            names.append(add(f"{prefix}{part}.weight", *shape, layer=True))
            names.append(add(f"{prefix}{part}.bias", shape[0]))
        for kind in ("weight", "bias"):
            names.append(add(f"{prefix}final_layer_norm.{kind}", hidden))
        stages.append(tuple(names))
    head = [add(f"model.decoder.final_layer_norm.{kind}", hidden) for kind in ("weight", "bias")]
    stages.append((*head, embedding[0]))
    return ModelSpec(
        architecture="OPTForCausalLM",
        model_type="opt",
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        experts_per_token=0,
        num_heads=config["num_attention_heads"],
        vocab_size=vocab,
        max_positions=positions,
        query_width=hidden,
        plain_scores=True,
        kv_widths=((hidden, hidden),) * layers,
        tensors=tensors,
        stages=tuple(stages),
        dtype=dtype,
        compute_dtype=compute_dtype,
        identify=lambda: f"named:{name}",
        weights="random",
        path=name,
    )


def profile_names() -> list[str]:
    """Names of the profiles that ship."""
    return sorted(_names("profiles"))


def published_profile(name: str) -> HardwareProfile:
    """One of them.

    Raises:
        ProfileError: if none is called so.
    """
    if name not in profile_names():
        raise ProfileError(
            f"no profile is called {name!r}: use one of {', '.join(profile_names())}, or a profile's file"
        )
    return HardwareProfile.from_dict(_content("profiles", name))


def find_profile(text: str) -> HardwareProfile:
    """The profile that a name or a file means.

    Raises:
        ProfileError: if it is neither, or the file is not a profile.
    """
    path = Path(text)
    is_file = text not in profile_names() and (path.suffix == ".json" or path.exists())
    return HardwareProfile.load(path) if is_file else published_profile(text)


def _names(folder: str) -> list[str]:
    """Names of the files in a folder of data."""
    files = (resources.files("engine.plan.paper") / folder).iterdir()
    return [file.name.removesuffix(".json") for file in files if file.name.endswith(".json")]


def _content(folder: str, name: str) -> Any:
    """What one of them holds."""
    return parse_json((resources.files("engine.plan.paper") / folder / f"{name}.json").read_bytes())


def _short(name: str) -> str:
    return name.removeprefix("facebook/").lower()


def _size(name: str) -> float:
    number = name.rpartition("-")[2]
    return float(number[:-1]) * (1e9 if number[-1] == "b" else 1e6)
