"""Names that users choose: what they may hold, so that they are shown and filed as they are."""

from __future__ import annotations

import unicodedata

from engine.errors import INVISIBLE, UsageError

_MOST_IN_FOLDERS = 150
"""Bytes of a folder's name; file systems take 255, and some of ours are put together from several."""


def problem_of_name(name: str, most: int) -> str:
    """Why a text cannot be a name of at most ``most`` bytes; empty if it can."""
    if not name.strip():
        return "is empty"
    if len(name.encode(errors="surrogatepass")) > most:
        return f"is longer than {most:,} bytes"
    if name != name.strip():
        return "begins or ends with a space"
    if name.startswith("-"):
        return "begins with a dash, as a flag does"
    for character in name:
        if unicodedata.category(character) in INVISIBLE:
            return f"has the invisible character U+{ord(character):04X}"
    return ""


def check_folder_name(what: str, name: str, most: int = _MOST_IN_FOLDERS) -> None:
    """Refuse a text that cannot be the name of a folder of ours.

    Args:
        what: is named so, for instance "suite".
        most: bytes.

    Raises:
        UsageError: naming the reason.
    """
    problem = problem_of_name(name, most)
    if not problem and (name.startswith(".") or "/" in name or "\\" in name):
        problem = "begins with a dot or has a slash"
    if problem:
        shown = f"{name[:40]}..." if len(name) > 40 else name
        raise UsageError(
            f"{what} {shown!r} is not a folder's name, as it {problem}: use letters, digits and hyphens"
        )
