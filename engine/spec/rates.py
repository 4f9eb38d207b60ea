"""The parts of a hardware profile: tables of rates, links, what attention takes, overheads.

A table of rates knows no unit: whoever names one says what its axes and its rates are.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from engine.errors import ProfileError
from engine.spec.fields import read_fields
from engine.spec.hardware import Tier

SMALLEST, LARGEST = 1e-6, 1e24
"""Of rates and of what they depend on: nothing real is beyond them, where a solver loses its footing."""


@dataclass(frozen=True)
class RateTable:
    """Rates at a grid of points; log-linear between them, constant beyond them.

    A rate that does not change is a table of one point (`RateTable.constant`).
    """

    rates: tuple[tuple[float, ...], ...]
    """Units of work per second, [len(xs), len(ys)], all above 0."""

    xs: tuple[float, ...] = (1.0,)
    """Ascending, above 0."""

    ys: tuple[float, ...] = (1.0,)
    """Of the second quantity, ascending, above 0; one point where there is none."""

    def __post_init__(self) -> None:
        for axis, points in (("xs", self.xs), ("ys", self.ys)):
            if not points or not all(map(_positive, points)) or list(points) != sorted(set(points)):
                raise ProfileError(
                    f"{axis}={list(points)} of a rate table are not ascending numbers "
                    f"of {SMALLEST:g} to {LARGEST:g}"
                )
        if len(self.rates) != len(self.xs) or any(len(row) != len(self.ys) for row in self.rates):
            raise ProfileError(
                f"a rate table of {len(self.xs)} x {len(self.ys)} points has rows of "
                f"{[len(row) for row in self.rates]} rates: give one rate per point"
            )
        for row in self.rates:
            for rate in row:
                if not _positive(rate):
                    raise ProfileError(f"a rate of {rate} is not a number of {SMALLEST:g} to {LARGEST:g}")

    @classmethod
    def constant(cls, rate: float) -> RateTable:
        """The same rate everywhere."""
        return cls(((float(rate),),))

    @classmethod
    def line(cls, points: Mapping[float, float]) -> RateTable:
        """A table over one quantity, from quantity to rate."""
        xs = tuple(sorted(points))
        return cls(tuple((float(points[x]),) for x in xs), tuple(float(x) for x in xs))

    def at(self, x: float, y: float = 1.0) -> float:
        """The rate at a point."""
        i, u = _place(self.xs, x)
        j, v = _place(self.ys, y)
        near = self._along(i, j, v)
        if not u:
            return near
        return math.exp((1 - u) * math.log(near) + u * math.log(self._along(i + 1, j, v)))

    def scaled(self, factor: float | Callable[[float], float]) -> RateTable:
        """All rates times a factor, which may depend on the first quantity."""
        factors = [factor(x) if callable(factor) else factor for x in self.xs]
        rates = tuple(tuple(r * by for r in row) for row, by in zip(self.rates, factors, strict=True))
        return RateTable(rates, self.xs, self.ys)

    @classmethod
    def from_dict(cls, data: object) -> RateTable:
        """Read a stored table, or a single number for a constant rate.

        Raises:
            ProfileError: if it is neither, or a point or rate is impossible.
            FieldError: if it holds something that is not a number.
        """
        if isinstance(data, (int, float)) and not isinstance(data, bool):
            return cls.constant(data)
        if not isinstance(data, Mapping) or "rates" not in data or set(data) - {"xs", "ys", "rates"}:
            raise ProfileError(f"{data!r} is not a rate table: give a number, or xs, ys and rates")
        return read_fields(cls, data)

    def _along(self, i: int, j: int, v: float) -> float:
        row = self.rates[i]
        return row[j] if not v else math.exp((1 - v) * math.log(row[j]) + v * math.log(row[j + 1]))


class Resource(StrEnum):
    """What the steps of a pass keep busy; two that want the same one share it."""

    COMPUTE = "compute"
    """Whatever computes: the accelerator, or the CPU where there is none."""

    HOST = "host"
    """The CPU beside an accelerator: attention on the host, copies within host memory."""

    DISK_READ = "disk read"
    DISK_WRITE = "disk write"
    TO_DEVICE = "to device"
    TO_HOST = "to host"


IN_FLIGHT = 2
"""Requests to a disk that are made at once."""


@dataclass(frozen=True)
class Link:
    """One direction between two tiers, by the engine's own way of moving bytes."""

    source: Tier
    target: Tier
    bandwidth: RateTable
    """Bytes per second by bytes of one transfer; many are under way at once, as the engine has them."""

    latency: float = 0.0
    """Seconds of the first byte, once per step of the schedule."""

    pinned: bool = True
    """Whether host memory is page-locked; without meaning where one end is the disk."""


@dataclass(frozen=True)
class AttentionRates:
    """Scores and weighted values, counted as 4 x query width x pairs of query and visible key FLOPs."""

    prompt: RateTable
    """FLOP/s of prompts on the device, by tokens of one prompt; a causal prompt of n has n(n+1)/2 pairs."""

    decode: Mapping[str, RateTable]
    """FLOP/s of decoding on the device by (context tokens of one sequence, sequences of the batch).

    Keys are written by `kv_key`: how the KV cache is kept, and how many query heads share a KV head.
    """

    decode_host: Mapping[str, RateTable] = field(default_factory=dict)
    """The same on the host of a machine whose device is a memory of its own; empty on others."""


@dataclass(frozen=True)
class Overheads:
    """Seconds that do not depend on how much is computed: interpreter, launches, calls."""

    per_pass: float = 0.0
    """Making and checking the schedule, the loop over sequences after a pass."""

    per_sequence: float = 0.0
    """Of each sequence once in a pass: accounting, the choice and the log-probability of its token."""

    per_step: float = 0.0
    """Handing one load or store to its stream and waiting for it."""

    per_wait: float = 0.0
    """By how much longer computation takes that had to wait for a stream: threads have to be woken,
    caches are cold."""

    per_embed: float = 0.0
    """Of each device batch once in a pass: the model's preamble to its layers."""

    per_embed_layer: float = 0.0
    """The same for each layer: what the preamble prepares for every one of them."""

    per_layer: float = 0.0
    """Of each device batch at each layer: modules, calls of kernels, launches."""

    per_prompt: float = 0.0
    """Of each sequence that computes a prompt, at each layer."""

    per_decode: float = 0.0
    """Of each sequence that decodes, at each layer, where all are attended to by one call."""

    per_loose: float = 0.0
    """Of each sequence that decodes, at each layer, where it is handled singly: its KV is packed in blocks
    of several tokens or keeps newest tokens exact."""

    per_moved: float = 0.0
    """Of each sequence at each layer whose KV cache is brought and stored, in each of the two steps."""

    per_host_attention: float = 0.0
    """Of each device batch at each layer that is attended to on the host."""

    per_head: float = 0.0
    """Of each `LOGITS_ROWS` rows of the head."""

    per_table_row: float = 0.0
    """Of each row of an embedding table that is fetched from elsewhere."""


@dataclass(frozen=True)
class Pace:
    """How fast a machine is at some moment, by measurements that are always the same.

    A machine that is shared, or throttled once a burst is over, has not one speed.
    """

    few: float
    """FLOP/s of products of few rows, which wait for weights to come from memory."""

    many: float
    """FLOP/s of products of many rows."""

    read: float
    """Bytes per second read from the disk."""


def _place(points: Sequence[float], at: float) -> tuple[int, float]:
    """The point at or below, and how far it is to the next, as a fraction on a logarithmic scale."""
    if at <= points[0]:
        return 0, 0.0
    if at >= points[-1]:
        return len(points) - 1, 0.0
    i = bisect_right(points, at) - 1
    return i, math.log(at / points[i]) / math.log(points[i + 1] / points[i])


def _positive(value: float) -> bool:
    return SMALLEST <= value <= LARGEST
