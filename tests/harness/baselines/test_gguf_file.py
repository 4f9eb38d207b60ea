"""What the conversion to GGUF changes: tensor names, and the order of rotated rows."""

from __future__ import annotations

import numpy as np
import pytest

from harness.baselines.base import Unsupported
from harness.baselines.systems.gguf_file import interleaved, translated


def test_names_are_translated_or_refused() -> None:
    assert translated("model.layers.11.self_attn.q_proj.weight") == "blk.11.attn_q.weight"
    assert translated("model.layers.0.mlp.down_proj.weight") == "blk.0.ffn_down.weight"
    assert translated("lm_head.weight") == "output.weight"
    for name in ("model.layers.0.mlp.experts.0.w1.weight", "model.vision.weight", "x"):
        with pytest.raises(Unsupported, match="does not know"):
            translated(name)


def test_rotating_neighbours_of_the_reordered_rows_is_rotating_halves() -> None:
    heads, size, width = 2, 8, 5
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((heads * size, width)), rng.standard_normal(width)
    angles = rng.standard_normal(size // 2)
    q = (weight @ x).reshape(heads, size)
    low, high = q[:, : size // 2], q[:, size // 2 :]
    halves = np.concatenate(
        [low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], 1
    )
    p = (interleaved(weight, heads) @ x).reshape(heads, size // 2, 2)
    even = p[..., 0] * np.cos(angles) - p[..., 1] * np.sin(angles)
    odd = p[..., 1] * np.cos(angles) + p[..., 0] * np.sin(angles)
    np.testing.assert_allclose(np.concatenate([even, odd], 1), halves)
