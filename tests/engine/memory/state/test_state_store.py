"""Where state is kept: rows are taken and given back once, and records come to the device and return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.memory.state.batch import StateRegion, StateUse
from engine.memory.state.store import StateStore
from engine.memory.storage import Tiers
from engine.plan.state import StateDraft
from engine.spec.hardware import Tier
from engine.spec.memory_plan import MemoryPlan, StatePlan
from engine.spec.model import ModelSpec, StateTensor
from engine.spec.policy import Policy
from tests.support.page_cache import resident_pages

STATES = (
    (StateTensor(0, "conv", 0, (6, 4), "float32"), StateTensor(0, "recurrent", 0, (3, 16), "float32")),
    (),
    (StateTensor(0, "recurrent", 0, (700, 3), "float32"),),
)
LAYERS = [index for index, tensors in enumerate(STATES) if tensors]
BATCH = 4


@contextmanager
def store_of(policy: Policy, unified: bool, folder: Path) -> Iterator[StateStore]:
    """A store as planned, over tiers that allow just the planned bytes."""
    spec = ModelSpec.__new__(ModelSpec)
    object.__setattr__(spec, "states", STATES)
    draft = StateDraft(spec, policy, unified, kept=policy.block_size, prefixes=1)
    plan = draft.plan()
    limits = dict.fromkeys(Tier, 0)
    for tier, _, nbytes in draft.uses(plan):
        limits[Tier.HOST if unified and tier is Tier.DEVICE else tier] += nbytes
    tiers = Tiers(torch.device("cpu"), unified, limits, folder)
    memory_plan = MemoryPlan.__new__(MemoryPlan)
    object.__setattr__(memory_plan, "state", plan)
    try:
        yield StateStore(spec, policy, memory_plan, tiers)
    finally:
        tiers.close()
    assert not any(tiers.ledger.held.values())


def uses_of(regions: list[StateRegion], has_past: bool) -> list[StateUse]:
    return [StateUse(first, 1, region, has_past) for first, region in enumerate(regions)]


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("place", ["device", "host", "disk", "0.25/0.25/0.5"])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "8"])
def test_what_a_layer_leaves_is_there_at_the_next_pass(
    unified: bool, place: str, form: str, tmp_path: Path
) -> None:
    policy = Policy.parse(f"state={place},state_quant={form},device_batch={BATCH},num_device_batches=2")
    with store_of(policy, unified, tmp_path) as store:
        regions = [store.allocate(slot, tokens=9) for slot in range(policy.block_size)]
        batches = [list(filter(None, regions[start : start + BATCH])) for start in (0, BATCH)]
        for step in range(3):
            for index, mine in enumerate(batches):
                order = mine if step != 1 else mine[::-1]  # as sequences lie after others left
                batch = store.batch(uses_of(order, has_past=step > 0))
                for layer in LAYERS:
                    store.load(layer, index % 2, batch)
                    view = store.view(layer, index % 2, batch)
                    assert view is not None
                    places: list[int] = []
                    for group in view.groups(0):
                        assert group.has_past is (step > 0)
                        at = range(BATCH)[group.places] if isinstance(group.places, slice) else group.places
                        for row, place_of_one in enumerate(list(at)):
                            region = order[int(place_of_one)]
                            mark = 1.0 + region.row + 10 * list(Tier).index(region.tier) + layer
                            for tensor in group.tensors.values():
                                if step:
                                    assert torch.allclose(tensor[row], torch.tensor(mark + step - 1), 0.01)
                                tensor[row] = mark + step
                        places += [int(one) for one in at]
                    assert sorted(places) == list(range(BATCH))
                    if store.moves:
                        store.store(index % 2)
        for region in filter(None, regions):
            store.free(region)
        if any(region.tier is Tier.DISK for region in filter(None, regions)):
            assert resident_pages(store._file.path) == 0


def test_a_row_is_given_back_once_and_taken_again(tmp_path: Path) -> None:
    policy = Policy.parse("device_batch=2,num_device_batches=1")
    with store_of(policy, True, tmp_path) as store:
        first, second = store.allocate(0, 5), store.allocate(1, 5)
        assert first is not None and second is not None and first.row != second.row
        store.free(first)
        with pytest.raises(ValueError, match="freed twice"):
            store.free(first)
        third = store.allocate(0, 5)
        assert third is not None and third.row == first.row


def test_nothing_is_kept_of_what_ends_with_its_first_pass(tmp_path: Path) -> None:
    with store_of(Policy(), True, tmp_path) as store:
        assert store.allocate(0, tokens=0) is None


def test_a_model_without_recurrent_layers_plans_nothing() -> None:
    spec = ModelSpec.__new__(ModelSpec)
    object.__setattr__(spec, "states", ())
    draft = StateDraft(spec, Policy(), True, 4, 1)
    assert draft.plan() == StatePlan()
    assert sum(nbytes for _, _, nbytes in draft.uses(draft.plan())) == 0
