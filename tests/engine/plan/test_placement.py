"""Fractions become whole tensors and whole slots, as close to the fractions as possible."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.engine import Engine
from engine.plan.placement import achieved, place_slots, spread
from engine.spec.hardware import Tier
from engine.spec.policy import Placement, Policy
from engine.spec.request import Request
from tests.support.engine_models import Family, prompts


@st.composite
def fractions(draw: st.DrawFn) -> Placement:
    parts = draw(st.tuples(*[st.integers(0, 100)] * 3).filter(any))
    total = sum(parts)
    return Placement(*(part / total for part in parts))


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=60), asked=fractions())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_prefix_is_within_one_item_of_what_was_asked(sizes: list[int], asked: Placement) -> None:
    tiers = spread(sizes, asked)
    assert len(tiers) == len(sizes)
    held, total = Counter[Tier](), 0
    for size, tier in zip(sizes, tiers, strict=True):
        assert asked.of(tier) > 0, "a tier that was not asked for gets nothing"
        held[tier] += size
        total += size
        for each in Tier:
            assert abs(held[each] - asked.of(each) * total) <= max(sizes) * (1 + 1e-9)


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=60), asked=fractions())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_achieved_fractions_are_those_of_the_items(sizes: list[int], asked: Placement) -> None:
    tiers = spread(sizes, asked)
    got = achieved(sizes, tiers)
    assert sum(got.values()) == pytest.approx(1)
    for tier in Tier:
        of_tier = sum(size for size, placed in zip(sizes, tiers, strict=True) if placed is tier)
        assert got[tier.value] == pytest.approx(of_tier / sum(sizes))
        assert abs(got[tier.value] - asked.of(tier)) <= max(sizes) / sum(sizes) + 1e-9


@given(asked=fractions(), batch=st.integers(1, 20), batches=st.integers(1, 8))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_seats_are_within_one_of_what_was_asked(asked: Placement, batch: int, batches: int) -> None:
    policy = Policy(device_batch=batch, num_device_batches=batches)
    counts = Counter(place_slots(policy, asked))
    assert counts.total() == batch * batches
    for tier in Tier:
        assert abs(counts[tier] - asked.of(tier) * batch * batches) <= 1 + 1e-9


@pytest.mark.parametrize("tier", list(Tier))
def test_all_in_one_tier(tier: Tier) -> None:
    assert set(spread([5, 1, 9], Placement.all_in(tier))) == {tier}


def test_neighbours_differ() -> None:
    assert spread([1] * 4, Placement(0.5, 0.5, 0)) in (
        [Tier.DEVICE, Tier.HOST, Tier.DEVICE, Tier.HOST],
        [Tier.DEVICE, Tier.HOST, Tier.HOST, Tier.DEVICE],
    )


def test_nothing_to_place() -> None:
    assert spread([], Placement(1, 0, 0)) == []
    assert achieved([], []) == {"device": 0.0, "host": 0.0, "disk": 0.0}


@pytest.mark.parametrize("policy", [
    "weights=0.2/0.3/0.5,kv=0.5/0.25/0.25,activations=0/0.5/0.5,device_batch=4,num_device_batches=2",
    "weights=0/0.1/0.9,kv=disk,weight_quant=4,device_batch=2,num_device_batches=2",
    "device_batch=1,num_device_batches=1",
])  # fmt: skip
def test_record_says_what_was_achieved(policy: str, llama: Family, offload: Path) -> None:
    """With as many equal requests as slots, the KV cache is placed as the slots are."""
    chosen = Policy.parse(policy)
    with Engine(llama.folder, chosen, offload_dir=offload, device="pretend") as engine:
        engine.answer([Request(prompt, 3) for prompt in prompts((6,) * chosen.block_size)])
        record, plan = engine.record(), engine.check([Request((5, 6), 3)])
    sizes = {name: tensor.numel for name, tensor in engine.spec.tensors.items()}
    for tier in Tier:
        mine = sum(size for name, size in sizes.items() if plan.weights[name].tier is tier)
        assert record.placement["weights"][tier.value] == pytest.approx(mine / sum(sizes.values()))
        for kind, slots in (("kv", plan.kv_slot_tiers), ("activations", plan.activation_tiers)):
            share = list(slots).count(tier) / chosen.block_size
            assert record.placement[kind][tier.value] == pytest.approx(share)
    assert record.policy == chosen.to_dict()
    assert record.kind == "measured"
