"""Policies are read, written and refused with one clear line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import PolicyError
from engine.spec.hardware import Budgets, Tier
from engine.spec.policy import Placement, Policy, QuantSpec, Schedule

KNOWN = {
    "resident": Policy(),
    "offloaded": Policy(
        name="offloaded", weights=Placement(0, 0.1, 0.9), kv=Placement(0, 0, 1), device_batch=8
    ),
}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (" , ", "empty"),
        ("nonesuch", "no policy is called 'nonesuch'"),
        ("offloadde", "did you mean 'offloaded'"),
        ("offloaded,kv_bits", "not key=value"),
        ("weights=", "not key=value"),
        ("wieghts=disk", "did you mean 'weights'"),
        ("colour=blue", "known keys"),
        ("weights=gpu", "not a placement"),
        ("weights=0.5/0.5", "not a placement"),
        ("weights=0.1/0.2/0.3/0.4", "not a placement"),
        ("weights=a/b/c", "not a placement"),
        ("weights=0.5/0.5/0.5", "sums to 1.5"),
        ("weights=0/0/0", "sums to 0"),
        ("kv=0.5/0.4/0", "sums to 0.9"),
        ("kv=-0.5/1/0.5", "outside 0 to 1"),
        ("kv=2/-1/0", "outside 0 to 1"),
        ("activations=nan/0/1", "outside 0 to 1"),
        ("activations=inf/0/0", "outside 0 to 1"),
        ("weight_bits=3", "3 bits are not available"),
        ("kv_bits=0", "0 bits are not available"),
        ("kv_bits=four", "not a whole number"),
        ("weight_bits=4,group_size=7", "group_size 7"),
        ("weight_bits=4,group_size=0", "group_size 0"),
        ("weight_bits=4,group_size=-64", "group_size -64"),
        ("device_batch=0", "device_batch=0"),
        ("num_device_batches=-1", "num_device_batches=-1"),
        ("max_batch_tokens=0", "max_batch_tokens=0"),
        ("device_batch=2.5", "not a whole number"),
        ("device_batch=many", "not a whole number"),
        ("schedule=fast", "sequential or overlapped"),
    ],
)
def test_malformed_policies_are_refused_with_one_line(text: str, words: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(text, KNOWN)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_names_and_pairs() -> None:
    assert Policy.parse("offloaded", KNOWN) == KNOWN["offloaded"]
    changed = Policy.parse("offloaded, kv_bits=4 ,name=mine", KNOWN)
    assert changed == KNOWN["offloaded"].replace(kv_quant=QuantSpec(4, 64), name="mine")
    assert Policy.parse("weights=disk").weights == Placement.all_in(Tier.DISK)
    assert Policy.parse("weights=disk,kv=0.25/0.25/0.5").name == "weights=disk,kv=0.25/0.25/0.5"
    assert Policy.parse("schedule=sequential").schedule is Schedule.SEQUENTIAL


def test_group_size_belongs_to_whatever_is_compressed() -> None:
    policy = Policy.parse("weight_bits=4,kv_bits=4,group_size=32")
    assert policy.weight_quant == policy.kv_quant == QuantSpec(4, 32)
    assert Policy.parse("kv_bits=4").weight_quant is None


def test_mapping_of_a_policy_file() -> None:
    mapping: dict[str, object] = {
        "weights": "0/0.1/0.9",
        "kv_bits": 4,
        "device_batch": 3,
        "schedule": "sequential",
    }
    policy = Policy.from_mapping(mapping)
    assert (policy.weights, policy.kv_quant, policy.device_batch) == (Placement(0, 0.1, 0.9), QuantSpec(), 3)
    assert Policy.from_mapping({}) == Policy()


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    def placement() -> Placement:
        device = draw(st.integers(0, 10))
        host = draw(st.integers(0, 10 - device))
        return Placement(device / 10, host / 10, (10 - device - host) / 10)

    group = draw(st.sampled_from([32, 64, 128]))
    return Policy(
        name=draw(st.text("abc-_ 0=/", min_size=1, max_size=9)),
        weights=placement(), kv=placement(), activations=placement(),
        weight_quant=draw(st.sampled_from([None, QuantSpec(4, group)])),
        kv_quant=draw(st.sampled_from([None, QuantSpec(4, group)])),
        device_batch=draw(st.integers(1, 99)), num_device_batches=draw(st.integers(1, 99)),
        max_batch_tokens=draw(st.integers(1, 9999)), schedule=draw(st.sampled_from(list(Schedule))),
    )  # fmt: skip


@given(policies())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_what_is_written_is_read_back(policy: Policy) -> None:
    assert Policy.from_mapping(policy.to_dict()) == policy
    pairs = ",".join(f"{key}={value}" for key, value in policy.to_dict().items() if key != "name")
    assert Policy.parse(pairs).replace(name=policy.name) == policy


def test_block_is_the_product() -> None:
    assert Policy(device_batch=3, num_device_batches=5).block_size == 15


def test_placements_print_as_they_are_written() -> None:
    for text in ("0.2/0.3/0.5", "1/0/0", "0/0.1/0.9"):
        assert str(Placement.parse(text)) == text
    assert Placement.parse("host") == Placement(0, 1, 0)


def test_budgets_by_tier() -> None:
    budgets = Budgets(device=1, disk=3)
    assert [budgets.of(tier) for tier in Tier] == [1, None, 3]
