"""The whole choice of how a model is run: placements, compression, block shape, schedule.

A policy is written as ``key=value`` pairs, inline (``weights=0.2/0.3/0.5,kv_quant=4``) or as a
mapping in a policy file; the keys are the fields of `Policy`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from engine.errors import PolicyError, did_you_mean
from engine.files.names import problem_of_name
from engine.spec.hardware import Tier
from engine.spec.kv_format import KVFormat
from engine.spec.precision import MatmulPrecision
from engine.spec.state_format import StateFormat
from engine.spec.weight_formats import EXACT, WeightFormats


@dataclass(frozen=True)
class Placement:
    """The requested fractions of one kind of tensor in each tier; they sum to 1.

    Whole tensors and whole sequences are indivisible, so what is *achieved* differs; it is computed
    before the run and logged beside what was asked.
    """

    device: float
    host: float
    disk: float

    def __post_init__(self) -> None:
        fractions = (self.device, self.host, self.disk)
        if not all(math.isfinite(f) and 0 <= f <= 1 for f in fractions):
            raise PolicyError(f"placement {self} has a fraction outside 0 to 1: write device/host/disk")
        if abs(sum(fractions) - 1) > 1e-6:
            raise PolicyError(
                f"placement {self} sums to {sum(fractions):g}, not to 1: change its three fractions"
            )

    def __str__(self) -> str:
        return f"{self.device:g}/{self.host:g}/{self.disk:g}"

    def of(self, tier: Tier) -> float:
        """The fraction of one tier."""
        fraction: float = getattr(self, tier.value)
        return fraction

    @classmethod
    def all_in(cls, tier: Tier) -> Placement:
        """Everything in one tier."""
        return cls(*(float(t is tier) for t in Tier))

    @classmethod
    def parse(cls, text: str) -> Placement:
        """Read ``device``, ``host``, ``disk`` or three fractions ``device/host/disk``.

        Raises:
            PolicyError: if it is neither, or the fractions do not sum to 1.
        """
        if text in list(Tier):
            return cls.all_in(Tier(text))
        try:
            device, host, disk = (float(part) for part in text.split("/"))
        except ValueError:
            raise PolicyError(
                f"{text!r} is not a placement: write device, host, disk or fractions such as 0.2/0.3/0.5"
            ) from None
        return cls(device, host, disk)


_NONE = {"kv_quant": EXACT, "calibration": "none"}
"""How fields that may be empty are written then, as in the default policy."""

_NOT_PACKED = WeightFormats()

MOST_SEQUENCES = 1 << 20
"""Largest block: far more than any machine holds, small enough to plan for."""

MOST_PADDING = 1 << 20

_LONGEST_NAME = 1000
"""Bytes; a policy without a name is called by its text."""

_ON_OFF = {True: "on", False: "off"}
_WORDS = {"true": "on", "yes": "on", "false": "off", "no": "off"}


class Schedule(StrEnum):
    """How the steps of a pass are walked."""

    SEQUENTIAL = "sequential"
    OVERLAPPED = "overlapped"


class HostAttention(StrEnum):
    """Whether decoding attends on the CPU to a KV cache in host memory, beside a device of its own."""

    AUTO = "auto"
    """Where some of it is there and the compiled kernels take it as it is kept."""

    ON = "on"
    OFF = "off"


class PrefixSharing(StrEnum):
    """Whether a prefix that several requests begin with is computed and kept once."""

    AUTO = "auto"
    """Where the answers are the same as without."""

    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class Policy:
    """Where everything lives, how it is kept, how many sequences share a pass."""

    name: str = "resident"
    """Its name in reports."""

    weights: Placement = Placement(1, 0, 0)
    kv: Placement = Placement(1, 0, 0)
    state: Placement = Placement(1, 0, 0)
    activations: Placement = Placement(1, 0, 0)
    """Fractions per tier of the weights, the KV cache, the recurrent and convolution state, and the hidden
    states between layers."""

    weight_quant: WeightFormats = _NOT_PACKED
    """Compression of weights; by default none, which keeps the checkpoint's own precision."""

    kv_quant: KVFormat | None = None
    """Compression of the KV cache; None keeps the precision that is computed in."""

    state_quant: StateFormat = StateFormat.FLOAT32
    """How recurrent and convolution state is kept between passes."""

    calibration: str = ""
    """File of statistics (`run_helm.py calibrate`) by which w8a8 or w4a8 smooths outliers; empty for none."""

    attention_fraction: float = 1.0
    """Part of the past tokens, by score, that each head attends to in decoding; 1 for all."""

    matmul_precision: MatmulPrecision = MatmulPrecision.HIGHEST
    """Of products of float32, where a CPU has a unit that is faster at bfloat16 (AMX, AVX512-BF16)."""

    device_batch: int = 16
    """Most sequences computed at once."""

    num_device_batches: int = 4
    """Device batches that share one pass over the weights; the block is their product."""

    max_batch_tokens: int = 2048
    """Most tokens of one device batch in a pass; further prompts wait. A longer prompt runs alone."""

    schedule: Schedule = Schedule.OVERLAPPED

    host_attention: HostAttention = HostAttention.AUTO

    prefix_sharing: PrefixSharing = PrefixSharing.AUTO

    prefix_kv: Tier = Tier.DEVICE
    """Tier of the KV cache of shared prefixes; it is kept in the bits of the rest."""

    refill: bool = True
    """Whether a free slot goes to a waiting request at the next pass; else when the whole block is done."""

    early_leaving: bool = True
    """Whether a finished sequence leaves; else it is computed on, unused, up to its ``max_new_tokens``."""

    padding: int = 0
    """Prompts are padded on the left to a multiple of this many tokens; 0 for no padding."""

    def __post_init__(self) -> None:
        if problem := problem_of_name(self.name, _LONGEST_NAME):
            raise PolicyError(f"a policy's name {problem}: {self.name[:40]!r}; name it with name=...")
        for key in ("device_batch", "num_device_batches", "max_batch_tokens"):
            if getattr(self, key) < 1:
                raise PolicyError(f"{key}={getattr(self, key)} is less than 1")
        if not 0 < self.attention_fraction <= 1:
            raise PolicyError(f"attention_fraction={self.attention_fraction:g} is not above 0 and at most 1")
        if self.calibration and not self.weight_quant.rounds_activations:
            raise PolicyError(
                "calibration smooths outliers for w8a8, w4a8: add weight_quant=w8a8 or leave it out"
            )
        if self.host_attention is HostAttention.ON and not self.kv.host:
            raise PolicyError(
                f"host_attention=on attends to KV in host memory, and kv={self.kv} places none there: "
                "place some of kv in host, or use auto"
            )
        self._check_sharing()
        if not 0 <= self.padding <= MOST_PADDING:
            raise PolicyError(f"padding={self.padding} is not in 0 to {MOST_PADDING:,}: 0 is no padding")
        if self.block_size > MOST_SEQUENCES:
            raise PolicyError(
                f"device_batch x num_device_batches = {self.block_size:,} sequences, more than "
                f"{MOST_SEQUENCES:,}: lower one of them"
            )

    def _check_sharing(self) -> None:
        if self.padding and self.kv_quant and not self.kv_quant.token_by_token:
            raise PolicyError(
                f"padding={self.padding} needs a KV cache whose tokens are packed one by one, and "
                f"kv_quant={self.kv_quant} packs several or keeps the newest: use kv_quant=4, or padding=0"
            )
        if self.prefix_sharing is PrefixSharing.ON and (reason := self._unshareable()):
            raise PolicyError(
                f"prefix_sharing=on would change answers with {reason}: change that, or use auto"
            )

    def _unshareable(self) -> str:
        """The first of its keys with which a shared prefix would change answers; empty for none."""
        if self.padding:
            return f"padding={self.padding}, which keeps every prompt for itself"
        if self.attention_fraction < 1:
            return f"attention_fraction={self.attention_fraction:g}, which ranks all past tokens together"
        if self.kv_quant and not self.kv_quant.token_by_token:
            return (
                f"kv_quant={self.kv_quant}, which packs tokens in blocks or by their distance from the newest"
            )
        return ""

    @property
    def shares_prefixes(self) -> bool:
        """Whether requests share the prefixes that they have in common."""
        return self.prefix_sharing is not PrefixSharing.OFF and not self._unshareable()

    @property
    def block_size(self) -> int:
        """Sequences that share one pass over the weights (FlexGen's effective batch size)."""
        return self.device_batch * self.num_device_batches

    def to_dict(self) -> dict[str, str | int | float]:
        """The policy as written in a policy file; `from_mapping` reads it back."""
        return {field.name: _written(field.name, getattr(self, field.name)) for field in fields(self)}

    @property
    def text(self) -> str:
        """Inline pairs, those that differ from the default policy's; `parse` reads them."""
        usual = Policy().to_dict()
        pairs = [f"{k}={v}" for k, v in self.to_dict().items() if k != "name" and v != usual[k]]
        return ",".join(pairs) or Policy.name

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object], base: Policy | None = None) -> Policy:
        """Build a policy from the keys of a policy file; missing keys come from ``base``.

        Raises:
            PolicyError: for an unknown key (naming the nearest known one) or an impossible value.
        """
        base = base or cls()
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in mapping if key not in known]:
            key = unknown[0]
            raise PolicyError(
                f"unknown policy key {key!r}{did_you_mean(key, known)}; known keys: {', '.join(known)}"
            )
        return base.replace(**{key: _read(key, value, getattr(base, key)) for key, value in mapping.items()})

    @classmethod
    def parse(cls, text: str, known: Mapping[str, Policy] | None = None) -> Policy:
        """Read a policy's name, or inline ``key=value,key=value`` pairs.

        Inline pairs start from the default policy, or from a known one named first:
        ``offloaded,kv_quant=4``. Without an explicit ``name=`` the text itself is the name.

        Raises:
            PolicyError: if it is neither a known name nor well-formed pairs.
        """
        known = known or {}
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise PolicyError("the policy is empty: give a name or key=value pairs")
        base = None
        if "=" not in parts[0]:
            name = parts.pop(0)
            if name not in known:
                raise PolicyError(
                    f"no policy is called {name!r}{did_you_mean(name, known)}: "
                    f"use one of {', '.join(known) or '(none defined)'} or write key=value pairs"
                )
            base = known[name]
            if not parts:
                return base
        pairs: dict[str, object] = {"name": text}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not value:
                raise PolicyError(f"{part!r} in policy {text!r} is not key=value")
            pairs[key.strip()] = value.strip()
        return cls.from_mapping(pairs, base)

    def replace(self, **changes: object) -> Policy:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _written(key: str, value: Any) -> str | int | float:
    """A field's value as it is written in a policy file."""
    if key in _NONE and not value:
        return _NONE[key]
    if isinstance(value, bool):
        return _ON_OFF[value]
    return value if isinstance(value, (int, float)) else str(value)


def _read(key: str, value: object, before: object) -> object:
    """A written value, of the type of the one before."""
    if key in _NONE and str(value) == _NONE[key]:
        return getattr(Policy, key)
    if key == "kv_quant":
        return KVFormat.parse(str(value))
    if isinstance(before, (bool, StrEnum)):
        word = _WORDS.get(str(value).lower(), str(value))
        words = list(_ON_OFF.values() if isinstance(before, bool) else type(before))
        if word not in words:
            known = (" or " if len(words) == 2 else ", ").join(words)
            raise PolicyError(f"{key}={word!r} is unknown: use {known}")
        return word == _ON_OFF[True] if isinstance(before, bool) else type(before)(word)
    if isinstance(before, (Placement, WeightFormats)):
        return before.parse(str(value))
    try:
        return type(before)(str(value))  # type: ignore[call-arg]
    except ValueError:
        raise PolicyError(f"{key}={value!r} is not a {'whole ' * isinstance(before, int)}number") from None
