"""Engine records of made-up runs."""

from __future__ import annotations

from typing import Any

from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord, MachineRecord, ModelRecord, TierRecord, TotalsRecord


def make_record(**changes: Any) -> EngineRecord:
    """The record of an engine that has answered nothing, save what ``changes`` says."""
    model = ModelRecord("folder/model", "OPTForCausalLM", "sha256:one", "trained", 0, "float32", "float32")
    known: dict[str, Any] = {
        "kind": "measured",
        "model": model,
        "policy": Policy().to_dict(),
        "placement": {},
        "memory": {tier.value: TierRecord(None, 0, 0) for tier in Tier},
        "totals": TotalsRecord(0, 0, 0, 0, 0.0, 0.0),
        "streams": {},
        "hardware": MachineRecord("cpu"),
        "software": {},
    }
    return EngineRecord(**known | changes)
