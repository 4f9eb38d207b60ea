"""The systems that can be named, in the order of tables; a system's file is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import UsageError, did_you_mean
from harness.baselines.base import Baseline, Generated, Ids, Job, Unsupported

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
    "flexgen": ("harness.baselines.systems.flexgen_opt", "FlexGenOpt"),
    "vllm": ("harness.baselines.systems.vllm_offload", "VllmOffload"),
}
"""Module and class of each system that has an adapter."""


class NotRun(Baseline):
    """A system without an adapter: it is listed, and its row in a comparison gives the reason."""

    def __init__(self, name: str, title: str, choices: str, reason: str) -> None:
        self.name, self.title, self.choices, self.not_run = name, title, choices, reason

    def load(self, job: Job) -> dict[str, Any]:
        """Refuse, with the reason."""
        raise Unsupported(self.not_run)

    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """Refuse, with the reason."""
        raise Unsupported(self.not_run)


NOT_RUN: Mapping[str, NotRun] = {
    system.name: system
    for system in (
        NotRun(
            "ollm",
            "oLLM",
            "Streams layers from disk on a CUDA device, with the KV cache on disk. Listed so that nobody "
            "thinks it was overlooked.",
            "oLLM 1.0.3 requires flash-attn, which is built from source with the CUDA compiler, and loads "
            "only the checkpoints that it names itself, so that it cannot read the same weights",
        ),
        NotRun(
            "petals",
            "Petals",
            "Shown by the figures that the FlexGen paper measured, labelled as published.",
            "Petals spreads layers over a swarm of machines; its newest release (2.2.0.post1) pins "
            "transformers below 4.35, and a swarm of one machine measures nothing of what it is for",
        ),
    )
}

NAMES = (*CLASSES, *NOT_RUN)


def get(name: str) -> Baseline:
    """The system of this name; raises UsageError for an unknown one."""
    if name in NOT_RUN:
        return NOT_RUN[name]
    if name not in CLASSES:
        raise UsageError(
            f"there is no baseline {name!r}{did_you_mean(name, NAMES)}: use one of {', '.join(NAMES)}"
        )
    module, kind = CLASSES[name]
    baseline: Baseline = getattr(importlib.import_module(module), kind)()
    return baseline


def chosen(names: Sequence[str]) -> list[tuple[Baseline, str]]:
    """Systems with configurations, from ``name`` (its default configurations) or ``name/configuration``.

    Raises:
        UsageError: for an unknown system or configuration.
    """
    found: dict[tuple[str, str], Baseline] = {}
    for text in (part for name in names for part in name.split(",") if part):
        name, _, configuration = text.partition("/")
        baseline = get(name)
        for chosen in [configuration] if configuration else baseline.default_configurations:
            if chosen not in baseline.configurations:
                known = ", ".join(baseline.configurations)
                raise UsageError(f"{name} has no configuration {chosen!r}: it has {known}")
            found[name, chosen] = baseline
    return [(baseline, configuration) for (_, configuration), baseline in found.items()]


def overrides(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings by system from ``SYSTEM.KEY=VALUE``; a value has the type of its default.

    Raises:
        UsageError: for malformed text, an unknown system or key, or a value of the wrong type.
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
    """All settings of a configuration before its variants; ``own`` are the user's, which win."""
    return {**baseline.defaults, **baseline.configurations[configuration].settings, **own}


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
