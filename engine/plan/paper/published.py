"""Hardware profiles that ship with the program: machines that are not here, from published figures."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from engine.errors import ProfileError
from engine.spec.profile import HardwareProfile


def profile_names() -> list[str]:
    """Names of the profiles that ship."""
    folder = resources.files("engine.plan.paper") / "profiles"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def published_profile(name: str) -> HardwareProfile:
    """One of them.

    Raises:
        ProfileError: if none is called so.
    """
    if name not in profile_names():
        raise ProfileError(
            f"no profile is called {name!r}: use one of {', '.join(profile_names())}, or a profile's file"
        )
    text = (resources.files("engine.plan.paper") / "profiles" / f"{name}.json").read_text(encoding="utf-8")
    return HardwareProfile.from_dict(json.loads(text))


def find_profile(text: str) -> HardwareProfile:
    """The profile that a name or a file means.

    Raises:
        ProfileError: if it is neither, or the file is not a profile.
    """
    path = Path(text)
    is_file = text not in profile_names() and (path.suffix == ".json" or path.exists())
    return HardwareProfile.load(path) if is_file else published_profile(text)
