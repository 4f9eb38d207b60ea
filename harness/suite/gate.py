"""Reads what a curve's gate accepted, so that a policy can be held to it.

It knows curve.json, as `harness.sweep.table` writes it, and policies.
"""

from __future__ import annotations

from pathlib import Path

from engine.errors import PolicyError
from engine.spec.format_key import FormatKey, format_key, reference_of
from engine.spec.policy import Policy
from harness.files import read_json
from harness.statistics import Verdict


def accepted_formats(path: Path, model_digest: str | None = None) -> list[FormatKey]:
    """The formats that a curve's gate accepted, the cheapest first.

    Args:
        path: of a curve.json.
        model_digest: of the model that is to be run; None does not compare.

    Raises:
        PolicyError: if there is no such curve, or it is of another model.
    """
    content = read_json(path)
    try:
        accepted = [row for row in content["rows"] if row["verdict"] == Verdict.ACCEPTED]
        found = [
            format_key(Policy.from_mapping({key: row[key] for key in FormatKey._fields}))
            for row in sorted(accepted, key=lambda row: row["bits"])
        ]
        digest = str(content["model"]["digest"])
    except (KeyError, TypeError, ValueError):
        raise PolicyError(f"{path} is no curve: make one with `run_helm.py curve`") from None
    if model_digest is not None and digest != model_digest:
        raise PolicyError(
            f"{path} is the curve of another model ({digest[:19]}, not {model_digest[:19]}): "
            "make one of this model with `run_helm.py curve`"
        )
    return found


def check_accepted(policy: Policy, path: Path, model_digest: str | None = None) -> None:
    """Make sure that a policy compresses nothing, or as a curve's gate has accepted.

    Raises:
        PolicyError: if it does not, or there is no such curve.
    """
    formats = accepted_formats(path, model_digest)
    key = format_key(policy)
    if key != format_key(reference_of(policy)) and key not in formats:
        known = "; ".join(map(str, formats)) or "none"
        raise PolicyError(
            f"policy {policy.name!r} compresses by {key}, which {path} does not accept: accepted are {known}"
        )
