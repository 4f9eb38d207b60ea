"""Small sizes of recurrent layers, for the tiny model by which an architecture is checked."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

SMALL_STATE: dict[str, int] = {
    "mamba_d_state": 16, "state_size": 16, "ssm_state_size": 16, "mamba_d_head": 16, "mamba_head_dim": 16,
    "mamba_headdim": 16, "mamba_n_groups": 2, "mamba_ngroups": 2, "n_groups": 2, "mamba_chunk_size": 16,
    "chunk_size": 16, "mamba_dt_rank": 4, "time_step_rank": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_head_dim": 16, "linear_num_heads": 4, "lru_width": 64, "attention_window_size": 8,
    "block_size": 8, "attention_hidden_size": 128, "attention_head_dim": 32, "adapter_rank": 4,
}  # fmt: skip
"""By the names that configs use; only those that a config has, and that are larger there, are set."""

_HEADS = (
    ("mamba_n_heads", "mamba_d_head"),
    ("mamba_num_heads", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_headdim"),
    ("num_heads", "head_dim"),
)
"""Names of heads and of their widths, whose product is the inner width of a state-space layer."""

_FACTORS = ("mamba_expand", "expand")
"""Names of the inner width over the hidden size."""


def shrink_state(text: Any) -> None:
    """Make the recurrent layers of a config small, whose hidden size is so already."""
    for name, value in SMALL_STATE.items():
        before = getattr(text, name, None)
        if isinstance(before, int) and before > value:
            write(text, name, value)
    factor = next((getattr(text, name) for name in _FACTORS if hasattr(text, name)), None)
    if factor is None:
        return
    inner = int(factor * text.hidden_size)
    if getattr(text, "mamba_d_ssm", None):
        write(text, "mamba_d_ssm", inner)
    for heads, width in _HEADS:
        if hasattr(text, heads) and isinstance(getattr(text, width, None), int):
            write(text, heads, inner // getattr(text, width))


def write(text: Any, name: str, value: Any) -> None:
    """Set a value of a config, where it can be set."""
    with suppress(Exception):  # a property, or refused by the config's own validation
        setattr(text, name, value)
