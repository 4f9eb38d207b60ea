"""Which systems there are, by name; a system's file is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import UsageError
from harness.baselines.base import Baseline, Configuration

OURS = "ours"
REFERENCE = "transformers"

CLASSES: Mapping[str, tuple[str, str]] = {
    OURS: ("harness.baselines.systems.ours", "Ours"),
    "accelerate": ("harness.baselines.systems.accelerate_offload", "AccelerateOffload"),
    REFERENCE: ("harness.baselines.systems.transformers_plain", "TransformersPlain"),
    "llama-cpp": ("harness.baselines.systems.llama_cpp", "LlamaCpp"),
    "deepspeed": ("harness.baselines.systems.deepspeed_zero", "DeepSpeedZero"),
    "airllm": ("harness.baselines.systems.airllm_layers", "AirLlmLayers"),
    "openvino": ("harness.baselines.systems.openvino_models", "OpenVinoModels"),
    "ollm": ("harness.baselines.systems.ollm_layers", "OllmLayers"),
    "flexgen": ("harness.baselines.systems.flexgen_opt", "FlexGenOpt"),
    "vllm": ("harness.baselines.systems.vllm_offload", "VllmOffload"),
    "petals": ("harness.baselines.systems.petals_swarm", "PetalsSwarm"),
}
"""Module and class by name, in the order of tables."""


def get(name: str) -> Baseline:
    """One system.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in CLASSES:
        close = difflib.get_close_matches(name, CLASSES, n=1)
        cure = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(CLASSES)}"
        raise UsageError(f"there is no baseline {name!r}: {cure}")
    module, kind = CLASSES[name]
    baseline: Baseline = getattr(importlib.import_module(module), kind)()
    return baseline


def chosen(names: Sequence[str]) -> list[tuple[Baseline, str]]:
    """Systems and configurations from ``name`` (its default ones) or ``name/configuration``.

    Raises:
        UsageError: for an unknown system or configuration.
    """
    found: dict[tuple[str, str], Baseline] = {}
    for text in (part for name in names for part in name.split(",") if part):
        name, _, configuration = text.partition("/")
        baseline = get(name)
        wanted = [configuration] if configuration else baseline.default_configurations
        for one in wanted:
            if one not in baseline.configurations:
                known = ", ".join(baseline.configurations)
                raise UsageError(f"{name} has no configuration {one!r}: it has {known}")
            found[name, one] = baseline
    return [(baseline, configuration) for (_, configuration), baseline in found.items()]


def overrides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings by system from ``SYSTEM.KEY=VALUE``; a value has the type of its default.

    Raises:
        UsageError: for a malformed text, an unknown system or key, or a value of another type.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        where, equals, value = text.partition("=")
        name, dot, key = where.partition(".")
        if not (equals and dot):
            raise UsageError(f"--set takes SYSTEM.KEY=VALUE, not {text!r}")
        defaults = get(name).defaults
        if key not in defaults:
            raise UsageError(f"{name} has no setting {key!r}: it has {', '.join(defaults) or 'none'}")
        found.setdefault(name, {})[key] = _typed(value, defaults[key], where)
    return found


def settings_of(baseline: Baseline, configuration: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a configuration before its variants; ``own`` are the reader's, which win."""
    chosen_one: Configuration = baseline.configurations[configuration]
    return {**baseline.defaults, **chosen_one.settings, **own}


def _typed(text: str, default: object, where: str) -> Any:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{where} is true or false, not {text!r}")
        return text.lower() == "true"
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            raise UsageError(f"{where} is a number such as {default}, not {text!r}") from None
    return text
