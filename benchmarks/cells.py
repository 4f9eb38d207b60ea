"""The settings, loads and blocks that limits.py measures."""

from __future__ import annotations

from dataclasses import dataclass

SETTINGS: dict[str, tuple[str, ...]] = {
    "all in RAM": ("weights=host,kv=host", "weights=device,kv=device"),
    "weights on disk": ("weights=disk,kv=host",),
    "weights and KV on disk": ("weights=disk,kv=disk",),
    "4-bit in RAM": ("weights=host,kv=host,weight_quant=4,kv_quant=4",),
    "4-bit on disk": ("weights=disk,kv=host,weight_quant=4,kv_quant=4",),
}
"""Policies per setting; where there are several, all are measured and the best counts."""


@dataclass(frozen=True)
class LoadShape:
    """Prompts of one length and tokens to generate."""

    name: str
    prompt: int
    generate: int

    @property
    def contexts(self) -> tuple[int, ...]:
        """Tokens in the KV cache at the first and at the last decode pass, if they differ by much."""
        last = self.prompt + self.generate - 2
        return (self.prompt, last) if last - self.prompt > 64 else (self.prompt,)


LOADS = (
    LoadShape("decode-heavy 128/128", 128, 128),
    LoadShape("prefill-heavy 512/8", 512, 8),
    LoadShape("paper 512/32", 512, 32),
)

BLOCKS = ("1x1", "4x1", "16x1", "64x1")
"""Sequences per device batch x device batches."""

PREFILL_SECONDS = {"tiny": 1.0, "125m": 3.0, "1.3b": 20.0, "6.7b": 40.0}
"""Max predicted seconds of a prefill pass; blocks that take longer are skipped, with a note."""

DECODE_SECONDS = {"tiny": 0.5, "125m": 2.0, "1.3b": 8.0, "6.7b": 20.0}
"""Max seconds of the decode passes of a repetition: as many as fit, at least two, if one pass fits."""

WEIGHT = {"tiny": 0.1, "125m": 1.0, "1.3b": 3.0, "6.7b": 6.0}
"""Relative shares of the time per shape."""


def block_of(text: str) -> tuple[int, int]:
    """Device batch and number of device batches of ``16x2``, or of ``16`` for one.

    Raises:
        ValueError: if it is neither.
    """
    batch, _, batches = text.partition("x")
    return int(batch), int(batches or 1)
