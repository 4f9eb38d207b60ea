"""State as bytes: what is packed comes back as near as its format allows, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from engine.memory.state import records
from engine.spec.model import StateTensor
from engine.spec.state_format import StateFormat
from engine.spec.state_layout import StateLayer

TENSORS = (
    StateTensor(0, "conv", 0, (6, 4), "float32"),
    StateTensor(0, "recurrent", 0, (3, 5, 32), "float32"),
    StateTensor(1, "conv", 1, (7, 3), "bfloat16"),
)
ERROR = {StateFormat.FLOAT32: 0.0, StateFormat.BFLOAT16: 2**-8, StateFormat.INT8: 1 / 127}


def some_states(module: int, count: int) -> records.States:
    generator = torch.Generator().manual_seed(module)
    return {
        (tensor.kind, tensor.index): torch.randn(count, *tensor.shape, generator=generator).to(
            getattr(torch, tensor.dtype)
        )
        for tensor in TENSORS
        if tensor.module == module
    }


@pytest.mark.parametrize("form", StateFormat)
def test_states_come_back(form: StateFormat) -> None:
    layer, count = StateLayer(TENSORS, form), 4
    kept = torch.full((count, layer.nbytes), 255, dtype=torch.uint8)
    written = {module: some_states(module, count) for module in (0, 1)}
    for module, states in written.items():
        records.keep(states, kept, layer, module)
    for module, states in written.items():
        for key, state in records.copies(kept, layer, module).items():
            assert state.shape == states[key].shape and state.dtype == states[key].dtype
            largest = states[key].abs().amax(-1, keepdim=True).float()
            assert ((state - states[key]).abs().float() <= ERROR[form] * largest + 1e-12).all()


def test_bytes_shrink_with_the_format() -> None:
    exact, half, eighth = (StateLayer(TENSORS, form).nbytes for form in StateFormat)
    assert exact > half > eighth
    assert eighth <= exact / 3


def test_states_that_are_kept_exactly_are_computed_with_where_they_lie() -> None:
    layer = StateLayer(TENSORS, StateFormat.FLOAT32)
    kept = torch.zeros(3, layer.nbytes, dtype=torch.uint8)
    records.views(kept[1:], layer, 0)["recurrent", 0].fill_(2.0)
    found = records.copies(kept, layer, 0)["recurrent", 0]
    assert not found[0].any() and (found[1:] == 2.0).all()


def test_a_row_of_zeros_stays_zero_in_8_bits() -> None:
    layer = StateLayer(TENSORS, StateFormat.INT8)
    kept = torch.empty(1, layer.nbytes, dtype=torch.uint8)
    records.keep({key: torch.zeros_like(t) for key, t in some_states(0, 1).items()}, kept, layer, 0)
    assert not any(state.any() for state in records.copies(kept, layer, 0).values())
