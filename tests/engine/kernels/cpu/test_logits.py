"""Summaries of the head's logits in C against torch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.cpu import native
from tests.engine.kernels.cpu.native_inputs import quick

WIDTHS = st.sampled_from([1, 3, 15, 16, 17, 64, 1000, 1024, 1025, 50_272])


@pytest.mark.usefixtures("library")
@quick
@given(
    rows=st.integers(1, 5), width=WIDTHS, scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e4]),
    whole=st.booleans(), hidden=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_summaries_are_those_of_float64(
    rows: int, width: int, scale: float, whole: bool, hidden: bool, seed: int
) -> None:
    """Integer logits are often equal, so that the first of the highest has to be found."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width + 5, generator=generator)[:, 2 : 2 + width] * scale
    logits = logits.round() if whole else logits
    if hidden and width > 1:
        logits[:, torch.randint(width, (width // 2,), generator=generator)] = -torch.inf
    places, lse = native.summarise(logits, threads=2)
    expected = logits.double()
    assert places.tolist() == [row.index(max(row)) for row in expected.tolist()]
    assert torch.allclose(lse.double(), expected.logsumexp(-1), rtol=1e-6, atol=2e-6)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("width", [7, 40])
@pytest.mark.parametrize("place", [0, 6, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_the_total(width: int, place: int, value: float) -> None:
    logits = torch.randn(2, width)
    logits[1, place] = value
    lse = native.summarise(logits)[1]
    assert lse.isfinite().tolist() == [True, False]
