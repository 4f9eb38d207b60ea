"""Made-up hardware profiles for tests: round figures like those of a T4 and a CPU, none measured."""

from __future__ import annotations

from typing import Any

from engine.spec.hardware import Tier
from engine.spec.profile import HardwareProfile, ProfileKind
from engine.spec.rates import AttentionRates, Link, Overheads, RateTable

GB = 10**9


def _fields(**fields: Any) -> dict[str, Any]:
    return fields


def make_profile(unified: bool = False, **changes: Any) -> HardwareProfile:
    """An accelerator with 16 GB beside 200 GB and a disk, or a CPU with 16 GB and a disk."""
    constant = RateTable.constant
    number = "float32" if unified else "float16"
    on_host = {} if unified else {f"{number}@1": constant(12e9)}
    links = [Link(Tier.DISK, Tier.HOST, constant(2 * GB)), Link(Tier.HOST, Tier.DISK, constant(1 * GB))]
    if not unified:
        links += [
            Link(Tier.HOST, Tier.DEVICE, constant(12 * GB)),
            Link(Tier.DEVICE, Tier.HOST, constant(6 * GB)),
        ]
    fields = _fields(
        name="made-up",
        kind=ProfileKind.PUBLISHED,
        source="made up",
        machine={"cpu": "none", "cores": 2, "memory_bytes": 16 * GB, "device": "cpu"},
        unified=unified,
        capacity={Tier.DEVICE: 16 * GB, Tier.HOST: (16 if unified else 200) * GB, Tier.DISK: 1500 * GB},
        memory_bandwidth={Tier.DEVICE: 300.0 * GB, Tier.HOST: 60.0 * GB},
        links=tuple(links),
        products={number: RateTable.line({1: 0.2e12, 64: 4e12, 2048: 20e12})},
        attention=AttentionRates(constant(10e12), {f"{number}@1": constant(0.1e12)}, on_host),
        elementwise=constant(5e9),
        logits=constant(2e10),
        kv_append={number: constant(5e10), "4": constant(1e10)},
        unpack={"4": constant(1e11)},
        overheads=Overheads(per_pass=1e-3, per_layer=1e-4, per_step=1e-5),
    )
    return HardwareProfile(**{**fields, **changes})
