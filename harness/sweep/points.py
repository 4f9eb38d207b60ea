"""One format's measurements as they are kept on disk, so that a killed sweep loses at most one format.

It knows numbers and JSON, and not how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.spec.fields import FieldError, read_fields
from engine.spec.record import EngineRecord
from harness.files import read_json, write_json

SCHEMA = 1


@dataclass(frozen=True)
class EntryScore:
    """One run entry's main metric."""

    entry: str
    metric: str
    is_accuracy: bool
    """Whether it is a part of instances that are right, so that it counts for the mean and the gate."""

    value: float
    low: float
    high: float
    """The 95 % interval."""

    values: Mapping[str, float]
    """By instance."""


@dataclass(frozen=True)
class Likelihood:
    """Of the items of one kind: answers, windows of text, or last words."""

    nll: Sequence[float]
    """Negative log-likelihood of each continuation in nats."""

    tokens: Sequence[int]
    """Tokens of each."""

    greedy: Sequence[bool]
    """Whether each token of it was the most probable one."""

    @property
    def per_token(self) -> float:
        """Mean nats per token."""
        return sum(self.nll) / sum(self.tokens)


@dataclass(frozen=True)
class Divergence:
    """How far next-token distributions are from full precision's."""

    kl: float
    """Mean KL(full || format) in nats."""

    agreement: float
    """Part of the positions with the same most probable token."""

    positions: int


@dataclass(frozen=True)
class Speed:
    """Generated tokens per second of a fixed set of requests, measured some times over."""

    rates: Sequence[float]
    sequences: int
    prompt_tokens: int
    """Of all sequences."""

    new_tokens: int
    """Of each."""

    began: str = ""
    """When the rounds began of which this is a part, ISO 8601 in UTC; formats of one time took turns."""

    others: Sequence[float] = ()
    """Beside each rate: cores that other processes kept busy; empty where the system does not say."""


@dataclass(frozen=True)
class Storage:
    """Bytes as stored."""

    weight_bytes: int
    parameters: int
    kv_bytes_per_token: float
    kv_values_per_token: int
    kv_tokens: int
    """Tokens over which the bytes of one were averaged; newest tokens may be kept exact."""

    largest_block: int
    """Sequences of the shape below that fit the budgets, 0 if none does."""

    block_prompt: int
    block_new: int
    block_size: int
    """Of the policy; `bits` weighs KV cache and weights by it."""

    limits: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each tier for the largest block: the same for all formats of a curve."""

    @property
    def weight_bits(self) -> float:
        """Bits per weight, those that are not packed included."""
        return 8 * self.weight_bytes / self.parameters

    @property
    def kv_bits(self) -> float:
        """Bits per value of the KV cache."""
        return 8 * self.kv_bytes_per_token / self.kv_values_per_token

    @property
    def bits(self) -> float:
        """Bits per value of weights and the KV cache of one block of the policy together."""
        tokens = self.block_size * (self.block_prompt + self.block_new)
        stored = self.weight_bytes + tokens * self.kv_bytes_per_token
        return 8 * stored / (self.parameters + tokens * self.kv_values_per_token)


@dataclass(frozen=True)
class Point:
    """One format measured."""

    name: str
    policy: Mapping[str, Any]
    asked: Mapping[str, Any]
    """All that measurements depend on besides the format; a point with another is stale."""

    engine: EngineRecord
    """The engine's own record: model, hardware, software, memory."""

    created: str
    seconds: float
    """Time that measuring took."""

    storage: Storage
    speed: Speed | None = None
    """None until all formats' turn has come."""

    entries: Sequence[EntryScore] = ()
    answers: Likelihood | None = None
    text: Likelihood | None = None
    last_words: Likelihood | None = None
    divergence: Divergence | None = None
    kind: str = "measured"
    schema: int = SCHEMA

    def stale(self, policy: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
        """What differs from what is asked now, in words; empty if nothing does."""
        now = {**asked, "policy": _format(policy)}
        then = {"chat": "off", **self.asked, "policy": _format(self.policy)}
        changed = [key for key in now if now[key] != then.get(key)]
        return ", ".join(key.replace("_", " ") for key in changed)


def write_point(path: Path, point: Point) -> None:
    """Write a point.

    Raises:
        StorageError: if it cannot be written.
    """
    write_json(path, asdict(point) | {"engine": point.engine.to_json()})


def read_point(path: Path) -> Point | None:
    """Read a point; None where there is none, or one that this version did not write.

    Raises:
        StorageError: if there is one that cannot be read.
    """
    try:
        point = read_fields(Point, read_json(path))
    except FieldError:
        return None
    return point if point.schema == SCHEMA else None


def _format(policy: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in policy.items() if key != "name"}
