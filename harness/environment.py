"""Checks of the installation that are worth one clear line before any heavy work begins.

It knows which packages are troublesome and how, and nothing of what they are used for.
"""

from __future__ import annotations

import importlib
import importlib.util
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import UsageError, first_line
from engine.limits import require_memory
from engine.units import MIB

_IMPORTS = {"torch": 280 * MIB, "helm.benchmark": 145 * MIB, "lm_eval": 140 * MIB}
"""Bytes of memory that importing takes, by package, without those that the system can take back."""


def require_memory_for(package: str) -> None:
    """Make sure that there is the memory to import a large package, unless it is imported already.

    Raises:
        BudgetError: if there is not: the system would kill the process without a word.
    """
    if package not in sys.modules:
        require_memory(_IMPORTS[package], f"importing {package}")


def require_helm() -> None:
    """Make sure that crfm-helm can be imported.

    Raises:
        UsageError: if it is not installed, naming the cure.
    """
    try:
        found = importlib.util.find_spec("helm.benchmark") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise UsageError(
            "crfm-helm is not installed, and this command needs it: run `pip install crfm-helm` "
            "and then `pip uninstall torchvision`, or install from the project's lock"
        )


def check_torchvision() -> None:
    """Make sure that torchvision, where it is installed, fits the installed torch.

    crfm-helm demands torchvision, whose wheel on the package registry is built for CUDA. Beside a
    CPU torch its operators do not load, and then no model of transformers can be imported.

    Raises:
        UsageError: if it is installed and broken, naming the cure.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        extension = importlib.import_module("torchvision.extension")
        broken = "" if getattr(extension, "_has_ops", lambda: True)() else "its operators do not load"
    except Exception as error:  # whatever a mismatched binary raises
        broken = first_line(error)
    if broken:
        raise UsageError(
            f"the installed torchvision does not fit the installed torch ({broken}) and breaks every "
            "model of transformers: run `pip uninstall torchvision` (text runs never need it)"
        )


@contextmanager
def short_network_timeout(seconds: float = 5.0) -> Iterator[None]:
    """Within it, network attempts of third parties give up soon instead of stalling without a network."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
