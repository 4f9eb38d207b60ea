"""The engine's settings from a command line; the one place where flags become `EngineSettings`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from engine.spec.settings import EngineSettings

_FLAGS = (
    "model", "seed", "device", "device_memory", "host_memory", "disk", "offload_dir", "store", "verify",
    "trust_remote_code", "adapter",
)  # fmt: skip


def settings_from_args(args: Namespace, **chosen: Any) -> EngineSettings:
    """The settings that a command's flags describe; what a command has no flag for takes its default.

    Args:
        chosen: values that the command decides, by the flag's name; they replace the flags'.

    Raises:
        UsageError: for a value that cannot be used.
    """
    given = {**vars(args), **chosen}
    values = {flag: given.get(flag) for flag in _FLAGS}
    return EngineSettings.from_dict(
        values | {"weights": "random" if given.get("random_weights") else "trained"}
    )
