"""What of a policy changes its answers: formats of weights and KV cache, and how products are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from engine.spec.policy import Policy
from engine.spec.precision import MatmulPrecision
from engine.spec.weight_formats import WeightFormats

REFERENCE = "full"
"""Name of the policy that compresses nothing, with which all others are compared."""


class FormatKey(NamedTuple):
    """The keys of a policy that change its answers, as policy files write them."""

    weight_quant: str
    kv_quant: str
    attention_fraction: float
    calibration: str
    """Absolute path; empty for none."""

    matmul_precision: str

    def __str__(self) -> str:
        pairs = zip(self._fields, self, strict=True)
        return ", ".join(f"{key}={value}" for key, value in pairs if value != "")


def format_key(policy: Policy) -> FormatKey:
    """The format of a policy."""
    kept: dict[str, Any] = {key: policy.to_dict()[key] for key in FormatKey._fields}
    kept["calibration"] = str(Path(policy.calibration).resolve()) if policy.calibration else ""
    return FormatKey(**kept)


def reference_of(base: Policy) -> Policy:
    """The same policy with nothing compressed and nothing rounded to bfloat16."""
    return base.replace(
        name=REFERENCE,
        weight_quant=WeightFormats(),
        kv_quant=None,
        attention_fraction=1.0,
        calibration="",
        matmul_precision=MatmulPrecision.HIGHEST,
    )
