"""What an engine is made of besides its policy: the model, the device, the memory it may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from engine.errors import UsageError
from engine.spec.hardware import Budgets

Weights = Literal["trained", "random"]

_BUDGETS = {"device_memory": "device", "host_memory": "host", "disk": "disk"}
"""Names of the budgets in a flat mapping, and in `Budgets`."""


@dataclass(frozen=True)
class EngineSettings:
    """Everything that decides how a model is run, except the policy.

    Raises:
        UsageError: for weights of an unknown kind.
    """

    model: str
    """Local folder or hub name."""

    weights: Weights = "trained"
    """``random`` needs only a config and is meant for measuring speed."""

    seed: int = 0
    """Of random weights."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``pretend``."""

    budgets: Budgets = field(default_factory=Budgets)
    """Most bytes per tier; a tier without a budget may take all that is free."""

    offload_dir: Path = Path("results/offload")
    """Folder of the disk tier."""

    store: Path | None = None
    """Folder of the packed store; None is TIERBENCH_STORE, or the user's cache folder."""

    verify: bool = False
    """Whether the checkpoint is read even if its files look untouched, and all of the store's checksums are
    compared before its weights are used."""

    trust_remote_code: bool = False
    """Whether code that a checkpoint carries may run."""

    adapter: Path | None = None
    """Folder of a PEFT adapter (LoRA), merged into the weights as they are read."""

    def __post_init__(self) -> None:
        if self.weights not in ("trained", "random"):
            raise UsageError(f"weights={self.weights!r} is unknown: use trained or random")
        if self.adapter is not None and self.weights == "random":
            raise UsageError(f"adapter={self.adapter} changes trained weights, and weights=random has none")

    @classmethod
    def of(cls, model: str | Path | EngineSettings, changes: Mapping[str, Any]) -> EngineSettings:
        """Settings with some fields changed, or those of a model.

        Raises:
            TypeError: for a change that is not a field.
        """
        return replace(model, **changes) if isinstance(model, cls) else cls(str(model), **changes)

    def anywhere(self) -> EngineSettings:
        """The same for a process in another folder: local paths are absolute."""
        model = str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model
        adapter = self.adapter and self.adapter.resolve()
        return replace(self, model=model, adapter=adapter, offload_dir=self.offload_dir.resolve())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineSettings:
        """Read what `to_dict` wrote; a key that is missing or None takes its default.

        Raises:
            UsageError: for an unknown key.
        """
        given = {key: value for key, value in values.items() if value is not None}
        known = {one.name for one in fields(cls)} - {"budgets"}
        if unknown := given.keys() - known - _BUDGETS.keys():
            names = ", ".join(sorted(known | _BUDGETS.keys()))
            raise UsageError(f"unknown setting {min(unknown)!r} of an engine: known are {names}")
        budgets = Budgets(**{own: int(given.pop(name)) for name, own in _BUDGETS.items() if name in given})
        for name in ("offload_dir", "store", "adapter"):
            if name in given:
                given[name] = Path(given[name])
        return cls(**given, budgets=budgets)

    def to_dict(self) -> dict[str, str | int | bool | None]:
        """The settings as one flat mapping, budgets in bytes."""
        content = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "budgets"}
        content |= {name: getattr(self.budgets, own) for name, own in _BUDGETS.items()}
        return {key: str(value) if isinstance(value, Path) else value for key, value in content.items()}
