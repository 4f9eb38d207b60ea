"""What a policy's results are: the manifest that lies beside its journal.

It knows the engine's record and the versions of packages; it does not know runs or requests.

``{"schema", "suite", "policy", "run_entries", "runs", "created", "seeds", "command", "identity",
"engine", "earlier_sessions", "versions"}``. "engine" is the record of the last time the engine ran;
"earlier_sessions" are records of interrupted or smaller runs under the same identity. A record is written
after the first pass and then once a second, so that of a killed process all but the last second is known.
Of these "created", "command" and every figure in seconds or per second are times and may differ when a
suite is repeated; what the engine held and did also depends on where a suite was interrupted; the rest may
not. "runs" says of each finished run which digest its folder has.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.errors import PolicyError
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.request import Progress
from harness.files import read_json

SCHEMA = 1


def calibration_digest(policy: Policy) -> str:
    """Digest of the statistics that a policy smooths by, which may change under their name; empty for none.

    Raises:
        PolicyError: if they cannot be read.
    """
    if not policy.calibration:
        return ""
    try:
        return hashlib.sha256(Path(policy.calibration).read_bytes()).hexdigest()
    except OSError as error:
        raise PolicyError(
            f"calibration={policy.calibration} cannot be read ({error.strerror}): "
            "write it with run_helm.py calibrate"
        ) from error


def answer_identity(model_digest: str, weights: str, policy: Policy, device: str, seed: int) -> str:
    """Digest of all that answers and their times depend on besides the request itself.

    ``device`` is what computes, as the engine's record names it.
    Everything in a policy but its name counts, placements too: they change the times that are kept
    with the answers. Budgets do not count, so that a suite that ran out of memory can be continued
    with more of it.
    """
    chosen = {key: value for key, value in policy.to_dict().items() if key != "name"}
    chosen["calibration"] = calibration_digest(policy)
    content = [model_digest, weights, chosen, device, seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_manifest(
    suite: str,
    policy: str,
    identity: str,
    run_entries: Sequence[str],
    seed: int,
    record: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    ran: bool,
) -> dict[str, Any]:
    """Describe a policy's results.

    Args:
        record: the engine's own account.
        before: the manifest that is already there, if any.
        ran: whether the engine answered anything this time; otherwise the account that is already
            there stays.
    """
    same = before is not None and before.get("identity") == identity
    earlier = list(before["earlier_sessions"]) if same and before else []
    if same and before:
        if ran:
            earlier.append(before["engine"])
        else:
            record = before["engine"]
    return {
        "schema": SCHEMA,
        "suite": suite,
        "policy": policy,
        "run_entries": list(run_entries),
        "runs": dict(before["runs"]) if same and before else {},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": {"sampling": seed, "random_weights": seed},
        "command": shlex.join(sys.argv),
        "identity": identity,
        "engine": record,
        "earlier_sessions": earlier,
        "versions": {name: package_version(name) for name in ("crfm-helm", "datasets")},
    }


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Read a manifest; None where there is none or it is not one.

    Raises:
        StorageError: if there is one that cannot be read.
    """
    content = read_json(path)
    try:
        peak_bytes(content)
        shaped = isinstance(content["identity"], str) and isinstance(content["runs"], dict)
    except (KeyError, TypeError, ValueError):
        return None
    return content if shaped else None


def unfinished(record: Mapping[str, Any], state: Progress) -> dict[str, Any]:
    """The engine's record in the middle of its first call, with what that call has done so far.

    The engine itself adds a call to its totals when the call ends.
    """
    done = {
        "requests": state.finished,
        "passes": state.passes,
        "prompt_tokens": state.prompt_tokens,
        "generated_tokens": state.generated_tokens,
        "seconds": state.seconds,
    }
    shares = {
        name: {**stream, "share": stream["busy_seconds"] / state.seconds if state.seconds else 0.0}
        for name, stream in record["streams"].items()
    }
    return {**record, "totals": {**record["totals"], **done}, "streams": shares}


def peak_bytes(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Most bytes that were held in each tier in any session."""
    sessions = [manifest["engine"], *manifest["earlier_sessions"]]
    return {tier.value: max(int(s["memory"][tier.value]["peak"]) for s in sessions) for tier in Tier}


def package_version(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
