"""The settings in a checkpoint's folder: ``config.json`` within limits, and how its weights are quantised.

Nothing here knows an architecture. Limits stand for keys by how they end, since every family has its own
names, and are checked before anything is built from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ModelError
from engine.files.documents import DocumentError, read_json
from engine.units import MIB

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"

_MOST_BYTES = 16 * MIB
_MOST_ITEMS = 100_000
"""Of a list in a config."""

_LIMITS = tuple(
    (re.compile(ending), most)
    for ending, most in (
        (r"(layer|layers|blocks)$", 1_000),
        (r"(heads?|experts)$", 1 << 14),
        (r"vocab_size$", 1 << 24),
        (r"(positions?|position_embeddings|ctx|context|length|window|window_size|chunk_size)$", 1 << 40),
        (r"(size|dim|width|inner|embd)$|^d_[a-z]+$", 1 << 20),
    )
)
"""Largest numbers by the ends of keys, the first that fits; several times those of any model there is."""


def read_settings(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """A file of settings in a checkpoint's folder.

    Raises:
        ModelError: if it is missing, no JSON object, or asks for a size that no model has.
    """
    path = folder / name
    try:
        content = read_json(path, finite=False, most=_MOST_BYTES)
    except DocumentError as error:
        raise ModelError(f"{path} {error}: download it again") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object: give the folder that save_pretrained wrote")
    for where, value in _absurd(content, name):
        raise ModelError(f"{path} has {where}={value}: it does not belong to a model that can be run here")
    return content


_LONGEST_PATTERN, _MOST_REPEATS = 240, 5
"""Of a regular expression, in characters and in repetitions: more, or of groups, can search for ever."""


def pattern_of(text: str) -> re.Pattern[str]:
    """A regular expression that a file of settings brings.

    Raises:
        ValueError: if it is none, or one whose search may not end.
    """
    if len(text) > _LONGEST_PATTERN or len(re.findall(r"[*+{]", text)) > _MOST_REPEATS:
        raise ValueError(f"use at most {_LONGEST_PATTERN} characters and {_MOST_REPEATS} repetitions")
    if re.search(r"\)[*+{]", text):
        raise ValueError("use no repetition of a group")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None


def quantisation_of(folder: Path, config: Mapping[str, Any], has_packed: bool) -> Mapping[str, Any] | None:
    """How a checkpoint's weights are quantised, as ``quantization_config`` says it; None if they are not.

    Older writers put it into a file of its own: AutoGPTQ into ``quantize_config.json``, AutoAWQ into
    ``quant_config.json``. These count only where there are quantised weights.

    Args:
        config: content of ``config.json``.
        has_packed: whether the files hold quantised weights.

    Raises:
        ModelError: if a file is damaged.
    """
    settings = config.get("quantization_config")
    if settings is not None:
        if not isinstance(settings, dict):
            raise ModelError(
                f"{folder / CONFIG}: quantization_config is not a JSON object: download it again"
            )
        return settings
    if has_packed and (folder / "quantize_config.json").is_file():
        return {"quant_method": "gptq"} | read_settings(folder, "quantize_config.json")
    if has_packed and (folder / "quant_config.json").is_file():
        given = read_settings(folder, "quant_config.json")
        short = {"w_bit": "bits", "q_group_size": "group_size"}
        return {"quant_method": "awq"} | {short.get(key, key): value for key, value in given.items()}
    return None


def refuse_other_kinds(folder: Path, model: str) -> None:
    """Refuse a folder without ``config.json``, named as what it is.

    Raises:
        ModelError: always, if there is no ``config.json``.
    """
    if (folder / CONFIG).is_file():
        return
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_settings(folder, ADAPTER_CONFIG).get("base_model_name_or_path")
        raise ModelError(
            f"model folder {model} holds a PEFT adapter and no model: give its base, "
            f"--model {base or 'BASE'} --adapter {model}"
        )
    if gguf := sorted(folder.glob("*.gguf")):
        raise ModelError(
            f"model folder {model} holds GGUF files ({gguf[0].name}) and no config.json: {GGUF_CURE}"
        )
    raise ModelError(f"model folder {model} has no config.json: give the folder that save_pretrained wrote")


GGUF_CURE = (
    "GGUF is not read; give the folder of the model's safetensors files, which transformers writes from it: "
    "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(NEW)"
)


def refuse_adapter_beside(folder: Path) -> None:
    """Refuse a folder that holds an adapter beside its base, of which one can mean either.

    Raises:
        CheckpointError: naming the adapter.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    kind = read_settings(folder, ADAPTER_CONFIG).get("peft_type", "PEFT")
    raise CheckpointError(
        f"{folder} holds a {kind} adapter ({ADAPTER_CONFIG}) beside the model: say --adapter {folder} to "
        f"apply it, or move {ADAPTER_CONFIG} away to run the base alone"
    )


def _absurd(value: Any, key: str, where: str = "") -> Iterator[tuple[str, str]]:
    """Numbers that no model has, and where they stand; a list's have the list's own key."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _absurd(part, name, f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        if len(value) > _MOST_ITEMS:
            yield where, f"a list of {len(value):,}"
        for part in value[:_MOST_ITEMS]:
            yield from _absurd(part, key, where)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        most = next((most for ending, most in _LIMITS if ending.search(key)), None)
        if most is not None and value > most:
            yield where, f"{value:,} (more than {most:,})"
