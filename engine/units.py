"""Bytes, seconds and rates: how they are parsed from a command line and shown to a user.

Inside the program a size is an ``int`` of bytes, a time a ``float`` of seconds, a rate units per
second. Only this module knows any other unit.
"""

from __future__ import annotations

import re

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": GIB, "gib": GIB, "t": TIB, "tib": TIB,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Read a size such as ``16GiB``, ``512M`` (binary), ``2GB`` (decimal) or plain bytes.

    Raises:
        ValueError: if the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _FACTORS:
        raise ValueError(f"{text!r} is not a size; write for instance 16GiB, 512MiB, 2GB or 1048576")
    return int(float(match[1]) * _FACTORS[match[2].lower()])


def format_bytes(count: float) -> str:
    """Show a byte count with a binary unit and three significant digits: ``1.50 GiB``."""
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= factor:
            value = count / factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """Show a duration: ``850 ms``, ``12.3 s``, ``4:05``, ``2:03:10``."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_rate(per_second: float, unit: str) -> str:
    """Show a rate with three significant digits: ``1,234 token/s``, ``3.14 token/s``."""
    digits = 0 if per_second >= 100 else 1 if per_second >= 10 else 2
    return f"{per_second:,.{digits}f} {unit}/s"
