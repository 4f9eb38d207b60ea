"""Formats as policies: what is compressed how, on top of one policy that says where everything lives.

It knows policies and their names; it reads no file and runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.errors import PolicyError, did_you_mean
from engine.spec.format_key import REFERENCE, reference_of
from engine.spec.policy import Policy
from engine.spec.precision import MatmulPrecision
from harness.helm.registry import slug


def choose_formats(words: Sequence[str], known: Mapping[str, Policy], base: Policy) -> list[Policy]:
    """The formats of a sweep, without the reference.

    Args:
        words: names of ``known`` or key=value pairs; all of ``known`` if there are none.
        known: formats of a file, by name; they set keys of a format only.
        base: what the formats are put on top of.

    Raises:
        PolicyError: for an unknown name (naming the nearest), a key that no format has, or two formats of
            one name.
    """
    for word in words:
        name = word.split(",")[0].strip()
        if name and "=" not in name and name not in (REFERENCE, *known):
            hint = did_you_mean(name, [REFERENCE, *known])
            raise PolicyError(
                f"no format is called {name!r}{hint}: use {', '.join(known)}, or pairs such as "
                "name=mine,weight_quant=3-g32"
            )
    named = {REFERENCE: Policy(name=REFERENCE), **known}
    parsed = [Policy.parse(word, named) for word in words] if words else list(known.values())
    formats = [_on_top_of(base, policy) for policy in parsed]
    chosen = [policy for policy in formats if policy != reference_of(base)]
    _check_names([reference_of(base), *chosen])
    return chosen


def _on_top_of(base: Policy, policy: Policy) -> Policy:
    changes = {
        "weight_quant": policy.weight_quant,
        "kv_quant": policy.kv_quant,
        "attention_fraction": policy.attention_fraction,
        "calibration": policy.calibration,
        "matmul_precision": policy.matmul_precision,
    }
    if Policy(name=policy.name).replace(**changes) != policy:
        raise PolicyError(
            f"format {policy.name!r} sets more than {', '.join(changes)}: places and blocks are the same "
            "for all formats and belong into --policy"
        )
    if policy.matmul_precision is MatmulPrecision.HIGHEST:  # the default: a format says nothing of it
        changes["matmul_precision"] = base.matmul_precision
    return base.replace(name=policy.name, **changes)


def _check_names(policies: Iterable[Policy]) -> None:
    seen: dict[str, str] = {}
    for policy in policies:
        if slug(policy.name) in seen:
            raise PolicyError(
                f"two formats are called {seen[slug(policy.name)]!r} and {policy.name!r}: "
                "rename one with name=..."
            )
        seen[slug(policy.name)] = policy.name
