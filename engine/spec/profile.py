"""A machine as the planner sees it: capacities, links, rates, overheads.

A profile is either measured on the machine it speaks of, or put together from published figures; the
same cost model reads both. Bytes, seconds and units per second throughout; a multiplication and an
addition are two FLOPs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path

from engine.errors import ProfileError
from engine.files.documents import DocumentError, read_json
from engine.files.whole import write_whole
from engine.spec.fields import FieldError, read_fields
from engine.spec.hardware import Tier
from engine.spec.precision import MatmulPrecision
from engine.spec.rates import LARGEST, SMALLEST, AttentionRates, Link, Overheads, Pace, RateTable, Resource

VERSION = 1
"""Of the file format; a profile of another one is refused, for its figures would mean something else."""

_FORMAT = "tierbench profile"

MOST_CAPACITY = 1 << 60
"""Bytes of a tier."""

MOST_SECONDS = 1_000_000
"""Of a latency or an overhead; also how many times slower one resource may make another."""

_MOST_BYTES = 16 << 20


class ProfileKind(StrEnum):
    """Where a profile's figures come from."""

    MEASURED = "measured"
    PUBLISHED = "published"


@dataclass(frozen=True)
class HardwareProfile:
    """One machine."""

    name: str
    kind: ProfileKind
    source: str
    """How it was measured, or where each published figure is from."""

    machine: Mapping[str, str | int | float]
    """What it is: ``cpu``, ``cores``, ``memory_bytes``, ``device`` and whatever else identifies it."""

    unified: bool
    """Whether device and host are one memory; capacities of both are then the same bytes."""

    capacity: Mapping[Tier, int]
    """Bytes of each tier."""

    memory_bandwidth: Mapping[Tier, float]
    """Bytes per second that whatever computes at a tier (device, host) reads of its own memory."""

    links: tuple[Link, ...]

    products: Mapping[str, RateTable]
    """FLOP/s of x [rows, inputs] times a weight on the device by (rows, values of the weight).

    Keys: how the weight is kept where the product reads it, a kind of number (``float32``) or a format
    (``4``, ``4-column``); weights in memory, not in cache. ``4@medium`` is another `MatmulPrecision` than the
    default, of many rows.
    """

    attention: AttentionRates

    elementwise: RateTable
    """Hidden values (tokens x hidden size) per second through the rest of one layer: norms, rotations,
    activation of the inner width, residuals; by (tokens, hidden size)."""

    logits: RateTable
    """Logits per second from the head's product to chosen tokens and log-probabilities; by rows."""

    kv_append: Mapping[str, RateTable]
    """Values of keys and values per second that are kept after attention, by values of one call.

    Keys as those of `AttentionRates.decode` without the sharing: ``float32`` copies, others pack.
    """

    unpack: Mapping[str, RateTable] = field(default_factory=dict)
    """Values per second of weights unpacked or converted to what is computed in, by values of one weight;
    keys as in `products`."""

    overheads: Overheads = field(default_factory=Overheads)

    slowdown: Mapping[Resource, Mapping[Resource, float]] = field(default_factory=dict)
    """``slowdown[a][b]``: how many times longer work on ``a`` takes while ``b`` is busy; 1 if missing."""

    pace: Pace | None = None
    """At which the rates were measured; None where that is not known."""

    notes: Mapping[str, object] = field(default_factory=dict)
    """Whatever is worth keeping beside: software versions, date, seconds that measuring took, spreads."""

    def __post_init__(self) -> None:
        for tier in Tier:
            size = self.capacity.get(tier, -1)
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MOST_CAPACITY:
                raise ProfileError(
                    f"capacity of {tier} is {size}: give its bytes, 0 if there is none, "
                    f"at most {MOST_CAPACITY:,}"
                )
        if self.unified and self.capacity[Tier.DEVICE] != self.capacity[Tier.HOST]:
            raise ProfileError(
                f"profile {self.name!r} says that device and host are one memory but gives them "
                f"{self.capacity[Tier.DEVICE]:,} and {self.capacity[Tier.HOST]:,} bytes: give both the same"
            )
        for tier in (Tier.DEVICE, Tier.HOST):
            _require(self.memory_bandwidth.get(tier, 0.0), f"memory bandwidth of {tier}", above=True)
        for link in self.links:
            _require(link.latency, f"latency of {link.source} to {link.target}", MOST_SECONDS)
        for name, seconds in asdict(self.overheads).items():
            _require(seconds, f"overhead {name}", MOST_SECONDS)
        for name, rate in asdict(self.pace).items() if self.pace else ():
            _require(rate, f"pace {name}", above=True)
        for work, others in self.slowdown.items():
            for other, factor in others.items():
                if not 1 <= factor <= MOST_SECONDS:
                    raise ProfileError(
                        f"slowdown of {work} by {other} is {factor}: it is at least 1 (and at most 1e6)"
                    )
        for what in ("products", "kv_append"):
            if not getattr(self, what):
                raise ProfileError(f"profile {self.name!r} has no {what}: give at least one kind of number")
        if not self.attention.decode:
            raise ProfileError(f"profile {self.name!r} has no rates of decoding attention")
        wanted = [(Tier.DISK, Tier.HOST), (Tier.HOST, Tier.DISK)] if self.capacity[Tier.DISK] else []
        if not self.unified:
            wanted += [(Tier.HOST, Tier.DEVICE), (Tier.DEVICE, Tier.HOST)]
        for source, target in wanted:
            self.link(source, target)

    def link(self, source: Tier, target: Tier, pinned: bool = True) -> Link:
        """The link of a direction; where there is none for unpinned memory, the pinned one.

        Raises:
            ProfileError: if the profile has none.
        """
        found = [link for link in self.links if (link.source, link.target) == (source, target)]
        if not found:
            raise ProfileError(f"profile {self.name!r} has no link from {source} to {target}: add one")
        return next((link for link in found if link.pinned is pinned), found[0])

    def product(self, form: str, precision: MatmulPrecision = MatmulPrecision.HIGHEST) -> RateTable:
        """Rates of products of weights kept in a form; of the nearest one where it was not measured.

        Where no other precision was measured, the machine computes all alike.
        """
        chosen = _nearest_key(self.products, form)
        return self.products.get(precision.product_of(chosen), self.products[chosen])

    def unpacking(self, form: str) -> RateTable:
        """Rates of unpacking, likewise; as fast as memory where none was measured."""
        if not self.unpack:
            return RateTable.constant(self.memory_bandwidth[Tier.DEVICE] / 4)
        return self.unpack[_nearest_key(self.unpack, form)]

    def appending(self, form: str) -> RateTable:
        """Rates of keeping keys and values, likewise."""
        return self.kv_append[_nearest_key(self.kv_append, form)]

    def decoding(self, form: str, sharing: float, on_host: bool = False) -> RateTable:
        """Rates of decoding attention over a KV cache kept in a form.

        Args:
            sharing: query heads per KV head; the nearest measured number is taken.
        """
        tables = self.attention.decode_host if on_host else self.attention.decode
        if not tables:
            raise ProfileError(f"profile {self.name!r} has no rates of attention on the host")
        forms = {key.partition("@")[0]: None for key in tables}
        chosen = _nearest_key(forms, form)
        shared = {_sharing(key): key for key in tables if key.partition("@")[0] == chosen}
        return tables[shared[min(shared, key=lambda n: abs(math.log(n / max(sharing, 1))))]]

    def slowed(self, work: Resource, by: Resource) -> float:
        """How many times longer work on one resource takes while another is busy."""
        return self.slowdown.get(work, {}).get(by, 1.0)

    def to_dict(self) -> dict[str, object]:
        """As written in a file, where enums are their values; `from_dict` reads it back."""
        return {"format": _FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: object) -> HardwareProfile:
        """Read what `to_dict` writes.

        Raises:
            ProfileError: naming what is missing, unknown, of another version or impossible.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ProfileError(f'this is not a profile: it has no line "format": "{_FORMAT}"')
        if data.get("version") != VERSION:
            raise ProfileError(
                f"the profile is of version {data.get('version')!r}, not {VERSION}: measure again"
            )
        required = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
        if missing := sorted(required - set(data)):
            raise ProfileError(f"the profile lacks {', '.join(missing)}")
        _check_known("the profile", set(data) - {"format", "version"}, cls)
        for name, part in (("overheads", Overheads), ("pace", Pace)):
            if isinstance(data.get(name), Mapping):
                _check_known(f"{name} of the profile", set(data[name]), part)
        try:
            return read_fields(cls, data)
        except FieldError as error:
            raise ProfileError(f"the profile is damaged: {error}") from None

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            StorageError: if it cannot be written.
        """
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> HardwareProfile:
        """Read a file.

        Raises:
            ProfileError: naming the file and what is wrong with it.
        """
        try:
            return cls.from_dict(read_json(path, finite=False, most=_MOST_BYTES))
        except OSError as error:
            raise ProfileError(f"profile {path} cannot be read: {error.strerror or error}") from None
        except DocumentError as error:
            raise ProfileError(f"profile {path} {error}: measure again") from None
        except ProfileError as error:
            raise ProfileError(f"profile {path}: {error}") from None


def kv_key(form: str, sharing: int) -> str:
    """Key of a table of decoding attention: how KV is kept, query heads per KV head."""
    return f"{form}@{sharing}"


def _sharing(key: str) -> int:
    _, _, number = key.partition("@")
    if number and not (number.isdecimal() and int(number)):
        raise ProfileError(f"attention rates {key!r}: after @ stands the number of query heads per KV head")
    return int(number or 1)


def _bits(form: str) -> float:
    """Bits of one value of a kind of number or a format, to tell how near two are."""
    floats = {"float64": 64.0, "float32": 32.0, "float16": 16.0, "bfloat16": 16.0}
    digits = form[: len(form) - len(form.lstrip("0123456789"))]
    return floats.get(form, float(digits) if digits else 16.0)


def _nearest_key(keys: Mapping[str, object], form: str) -> str:
    """The key itself, or the form with the nearest number of bits, packed for packed, products of integers
    for such; none qualified by @."""
    if form in keys:
        return form

    def kind(key: str) -> tuple[bool, bool]:
        return key[:1].isdigit(), key.endswith("-a8")

    def distance(key: str) -> tuple[bool, bool, float]:
        packed, rounded = (one is not other for one, other in zip(kind(key), kind(form), strict=True))
        return packed, rounded, abs(_bits(key) - _bits(form))

    return min((key for key in keys if "@" not in key), key=distance)


def _require(value: float, what: str, most: float = LARGEST, above: bool = False) -> None:
    if not (SMALLEST if above else 0) <= value <= most:  # NaN is in no range
        low = "above 0" if above else "of at least 0"
        raise ProfileError(f"{what} is {value}: give a number {low} and at most {most:g}")


def _check_known(what: str, names: set[str], kind: type) -> None:
    if unknown := sorted(names - {field.name for field in fields(kind)}):
        raise ProfileError(f"{what} has unknown fields: {', '.join(unknown)}")
