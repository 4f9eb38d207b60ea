"""The offloading engine: answers batches of token-id requests within fixed memory budgets.

    from engine import Engine, Policy

Spec names it, plan decides it, memory moves it, models compute it, the runtime walks it. The names below
are imported when they are first used, so that importing ``engine`` or ``engine.spec`` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.engine import Engine as Engine
    from engine.spec.hardware import Budgets as Budgets
    from engine.spec.policy import Policy as Policy
    from engine.spec.request import Output as Output
    from engine.spec.request import Request as Request
    from engine.spec.settings import EngineSettings as EngineSettings

__all__ = ["Budgets", "Engine", "EngineSettings", "Output", "Policy", "Request"]

_MODULES = {
    "Budgets": "engine.spec.hardware",
    "Engine": "engine.engine",
    "EngineSettings": "engine.spec.settings",
    "Output": "engine.spec.request",
    "Policy": "engine.spec.policy",
    "Request": "engine.spec.request",
}

if not TYPE_CHECKING:  # a type checker knows the names from above, and that there are no others

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'engine' has no attribute {name!r}")
        return globals().setdefault(name, getattr(import_module(_MODULES[name]), name))
