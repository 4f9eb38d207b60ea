"""Policies are read, written and refused with one clear line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import PolicyError
from engine.spec.hardware import Budgets, Tier
from engine.spec.kv_format import KVFormat
from engine.spec.model import TensorSpec
from engine.spec.policy import HostAttention, Placement, Policy, Schedule
from engine.spec.precision import MatmulPrecision
from engine.spec.quant import WHOLE_ROW, Fit, QuantSpec
from engine.spec.state_format import StateFormat
from engine.spec.weight_formats import WeightFormats

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
        ("offloaded,kv_quant", "not key=value"),
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
        ("weight_quant=5", "5 bits are not available"),
        ("kv_quant=0", "0 bits are not available"),
        ("kv_quant=four", "'four' is not a format"),
        ("weight_quant=4-g7", "a group of 7 values"),
        ("weight_quant=4-g0", "a group of -1 values"),
        ("weight_quant=4-fast", "'fast' in format '4-fast' is unknown"),
        ("weight_quant=4-g32-g64", "says its group size twice"),
        ("weight_quant=4-row-column", "groups along columns need a size"),
        ("weight_quant=4-a8", "a8 wants symmetric groups along rows"),
        ("weight_quant=4-g16-symmetric-a8", "of 4 bits and 32, 64 or 128 values: use w8a8 or w4a8"),
        ("weight_quant=4-g32-symmetric-column-a8", "a8 wants symmetric groups along rows"),
        ("weight_quant=8-symmetric-a8", "of 8 bits and a whole row"),
        ("weight_quant=mlp=;default=4", "is not pattern=format"),
        ("name=-q", "begins with a dash"),
        ("name=\x1b[31mred", "invisible character U+001B"),
        ("name=a\u202eb", "invisible character U+202E"),
        (f"name={'a' * 1001}", "longer than 1,000 bytes"),
        ("weight_quant=(=4", "is not a regular expression"),
        ("kv_quant=w8a8", "the KV cache has no such option"),
        ("kv_quant=float17", "'float17' is not a format of the KV cache"),
        ("kv_quant=4/", "is not a format of the KV cache"),
        ("kv_quant=4+x", "is not a format of the KV cache"),
        ("kv_quant=4-column/4-g32-column", "want one group size"),
        ("kv_quant=kivi5", "5 bits are not available"),
        ("attention_fraction=0", "not above 0"),
        ("attention_fraction=1.5", "at most 1"),
        ("attention_fraction=half", "not a number"),
        ("calibration=stats.safetensors", "add weight_quant=w8a8"),
        ("matmul_precision=bf16", "use highest, high, medium"),
        ("device_batch=0", "device_batch=0"),
        ("num_device_batches=-1", "num_device_batches=-1"),
        ("max_batch_tokens=0", "max_batch_tokens=0"),
        ("device_batch=2.5", "not a whole number"),
        ("device_batch=many", "not a whole number"),
        ("schedule=fast", "sequential or overlapped"),
        ("host_attention=maybe", "use auto, on, off"),
        ("host_attention=on", "places none there"),
    ],
)
def test_malformed_policies_are_refused_with_one_line(text: str, words: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(text, KNOWN)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_names_and_pairs() -> None:
    assert Policy.parse("offloaded", KNOWN) == KNOWN["offloaded"]
    changed = Policy.parse("offloaded, kv_quant=4 ,name=mine", KNOWN)
    assert changed == KNOWN["offloaded"].replace(kv_quant=KVFormat(), name="mine")
    assert Policy.parse("weights=disk").weights == Placement.all_in(Tier.DISK)
    assert Policy.parse("weights=disk,kv=0.25/0.25/0.5").name == "weights=disk,kv=0.25/0.25/0.5"
    assert Policy.parse("schedule=sequential").schedule is Schedule.SEQUENTIAL


def test_formats_of_weights_and_kv_cache() -> None:
    policy = Policy.parse("weight_quant=mlp.*=3;embed=8-row;default=4-g32-mse,kv_quant=2-channel/2+64")
    assert policy.weight_quant.default == QuantSpec(4, 32, fit=Fit.ERROR)
    assert policy.weight_quant.rules == (("mlp.*", QuantSpec(3)), ("embed", QuantSpec(8, WHOLE_ROW)))
    assert policy.kv_quant == KVFormat.parse("kivi2")
    assert not Policy.parse("kv_quant=4").weight_quant and Policy.parse("weight_quant=4").kv_quant is None
    assert not Policy.parse("weight_quant=mlp=16;default=16").weight_quant


def test_the_first_rule_that_is_found_in_a_name_holds() -> None:
    formats = WeightFormats.parse("mlp.up=2,mlp=3,embed=8,default=4")
    found = {
        name: formats.of(TensorSpec(name, shape, "float32", compressible=compressible, fused=True))
        for name, shape, compressible in (
            ("layers.0.mlp.up.weight", (8, 8), True), ("layers.0.mlp.down.weight", (8, 8), True),
            ("layers.0.q.weight", (8, 8), True), ("embed.weight", (8, 8), False),
            ("mlp.norm.weight", (8,), False), ("head.weight", (8, 8), False),
        )
    }  # fmt: skip
    assert [form and form.bits for form in found.values()] == [2, 3, 4, 8, None, None]


def test_activations_are_rounded_only_where_the_product_is_ours() -> None:
    formats = WeightFormats.parse("w8a8")
    fused, bare = (
        formats.of(TensorSpec("experts", (2, 8, 8), "float32", compressible=True, fused=fused))
        for fused in (True, False)
    )
    assert fused and bare and (fused.activation_bits, bare.activation_bits) == (8, 16)


@given(
    formats=st.sampled_from(
        (
            "4",
            "3-g32-mse",
            "2-symmetric",
            "8-row-zero",
            "flexgen",
            "best4",
            "w8a8",
            "w4a8",
            "4-g64-symmetric-a8",
        )
    )
)
def test_a_format_is_read_back(formats: str) -> None:
    assert QuantSpec.parse(str(QuantSpec.parse(formats))) == QuantSpec.parse(formats)


def test_mapping_of_a_policy_file() -> None:
    mapping: dict[str, object] = {
        "weights": "0/0.1/0.9",
        "kv_quant": 4,
        "device_batch": 3,
        "schedule": "sequential",
    }
    policy = Policy.from_mapping(mapping)
    assert (policy.weights, policy.kv_quant, policy.device_batch) == (Placement(0, 0.1, 0.9), KVFormat(), 3)
    assert Policy.from_mapping({}) == Policy()
    for written, meant in ((True, "on"), (False, "off"), ("auto", "auto")):  # YAML's booleans
        assert Policy.from_mapping({"kv": "host", "host_attention": written}).host_attention == meant


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    def placement() -> Placement:
        device = draw(st.integers(0, 10))
        host = draw(st.integers(0, 10 - device))
        return Placement(device / 10, host / 10, (10 - device - host) / 10)

    kv = placement()
    rounding = draw(st.booleans())
    weights = st.sampled_from(["16", "4-g32", "mlp.*=3;default=4", "a=16;default=2"])
    return Policy(
        name=f"a{draw(st.text('abc-_ 0=/', max_size=9))}z",
        weights=placement(), kv=kv, state=placement(), activations=placement(),
        weight_quant=WeightFormats.parse("w8a8" if rounding else draw(weights)),
        state_quant=draw(st.sampled_from(list(StateFormat))),
        kv_quant=draw(st.sampled_from([None, *map(KVFormat.parse, ("4", "kivi2", "8-g32/4", "float16"))])),
        calibration=draw(st.sampled_from(["", "a/b.safetensors"])) if rounding else "",
        attention_fraction=draw(st.sampled_from([0.1, 0.25, 1.0])),
        matmul_precision=draw(st.sampled_from(list(MatmulPrecision))),
        device_batch=draw(st.integers(1, 99)), num_device_batches=draw(st.integers(1, 99)),
        max_batch_tokens=draw(st.integers(1, 9999)), schedule=draw(st.sampled_from(list(Schedule))),
        host_attention=draw(st.sampled_from([s for s in HostAttention if kv.host or s != "on"])),
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
