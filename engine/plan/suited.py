"""A policy as a model's attention can follow it."""

from __future__ import annotations

from engine.errors import UsageError
from engine.spec.model import ModelSpec
from engine.spec.policy import HostAttention, Policy, PrefixSharing


def suited_policy(policy: Policy, spec: ModelSpec) -> Policy:
    """The policy with what it leaves open chosen as the model's attention allows.

    Raises:
        UsageError: if the model's attention cannot do what the policy says.
    """
    if not spec.own_attention:
        return policy
    for asked, setting in (
        (policy.host_attention is HostAttention.ON, "host_attention=on"),
        (policy.prefix_sharing is PrefixSharing.ON, "prefix_sharing=on"),
        (policy.attention_fraction < 1, f"attention_fraction={policy.attention_fraction:g}"),
    ):
        if asked:
            raise UsageError(
                f"{setting} cannot be had with {spec.architecture}, whose attention runs in transformers' "
                "own code, one sequence after the other: leave it out"
            )
    return policy.replace(prefix_sharing=PrefixSharing.OFF, host_attention=HostAttention.OFF)
