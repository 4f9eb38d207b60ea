"""Measures this machine: capacities, links, products, attention, overheads, as a `HardwareProfile`.

Every figure comes from the engine's own path, so that a plan speaks of what the engine will do. What is
measured how is in `engine.profiling`; this module gives each its share of the time and puts them together.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import harmonic_mean

import torch

from engine.errors import ProfileError
from engine.kernels.backend import kernels_for, prepare
from engine.kernels.cpu import native
from engine.limits import memory_limits
from engine.machine import capacities, hardware, pick_device, software
from engine.memory.allocator import give_back, keep_freed_memory
from engine.memory.kv.host_attention import threads_beside
from engine.memory.storage import Tiers, check_offload_dir
from engine.plan.simulation.pace import at_pace
from engine.profiling import attention, layers, overheads, products
from engine.profiling.links import Transfers, measure_copies, measure_disk, scratch_tiers
from engine.profiling.pace import Steady, Yardstick
from engine.profiling.scope import Scope
from engine.profiling.slowdown import measure_slowdown
from engine.profiling.timing import Timing, steadied
from engine.profiling.whole_passes import decoding_beyond_parts
from engine.spec.hardware import Budgets, Tier
from engine.spec.kv_format import KVFormat
from engine.spec.profile import HardwareProfile, ProfileKind, kv_key
from engine.spec.rates import AttentionRates, Overheads, Pace, RateTable

OnStep = Callable[[str], None]

_SHARES = {
    "disk": 0.14, "copies": 0.06, "memory": 0.02, "products": 0.45, "attention": 0.16, "layers": 0.08,
    "unpacking": 0.04, "slowdown": 0.05,
}  # fmt: skip
"""Of the time; overheads and whole passes come on top, which take as long as they take."""

_ROUNDS = 3

_SETTLED = 0.05  # least part of a layer's other work that is put down to its tokens


def measure_profile(
    device: str,
    offload_dir: Path,
    *,
    seconds: float = 60.0,
    on_step: OnStep | None = None,
) -> HardwareProfile:
    """Measure this machine.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``pretend``.
        offload_dir: folder of the disk tier; scratch files of up to half a GiB are written there.
        seconds: how long to measure, about; fewer than 60 give fewer points, and less exact ones.
        on_step: called with a word for what is measured next.

    Raises:
        UsageError: if the device or the folder cannot be used.
        StorageError: if the disk is full or fails.
    """
    where, unified = pick_device(device, Budgets())
    check_offload_dir(offload_dir)
    begin = time.perf_counter()
    prepare(where)
    keep_freed_memory()
    try:
        with scratch_tiers(where, unified, offload_dir) as tiers:
            measuring = _Measuring(device, tiers, offload_dir, seconds, on_step or (lambda what: None))
            return measuring.profile(begin)
    finally:
        give_back()


def check_machine(profile: HardwareProfile, device: str) -> None:
    """Refuse a measured profile that is not of this machine, this device and this software.

    Raises:
        ProfileError: naming what differs.
    """
    for key, value in identity(device).items():
        if profile.machine.get(key) != value:
            raise ProfileError(
                f"profile {profile.name!r} was measured with {key}={profile.machine.get(key)!r}, here it is "
                f"{value!r}: measure this machine with run_helm.py profile --device {device}"
            )


def profile_name(device: str) -> str:
    """A name for this machine's profile, fit for a file: processor and device."""
    here, kind = identity(device), pick_device(device, Budgets())[0].type
    what = str(here["device"]) if kind == "cuda" else f"{here['cpu']} {kind if device == 'auto' else device}"
    return re.sub(r"[^a-z0-9]+", "-", f"{what} {here['threads']} threads".lower()).strip("-")


def identity(device: str) -> dict[str, str | int]:
    """What has to match for a profile to apply: machine, device, threads, torch and kernels.

    Raises:
        UsageError: if there is no such device.
    """
    where, unified = pick_device(device, Budgets())
    found = hardware(where, pretend=not unified and where.type == "cpu")
    known = {key: found[key] for key in ("cpu", "cores", "threads", "memory_bytes", "device")}
    return {**known, "torch": software()["torch"], "kernels": kernels_for(where).name}


@dataclass
class _Measuring:
    """One measurement under way."""

    name: str
    tiers: Tiers
    offload_dir: Path
    seconds: float
    on_step: OnStep
    spreads: dict[str, float] = field(default_factory=dict)
    """Largest distance of quartiles per kind of measurement, as a fraction of the mean."""

    products: dict[str, dict[tuple[float, float], list[float]]] = field(default_factory=dict)
    """FLOP/s by format, then by rows and values of the weight, of every repetition."""

    def __post_init__(self) -> None:
        self.device, self.unified = self.tiers.device, self.tiers.unified
        self.scope = Scope.within(self.seconds)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.yardstick = Yardstick(self.device, self.tiers)
        self.computing, self.reading = Steady(self.yardstick.computing), Steady(self.yardstick.reading)

    def profile(self, begin: float) -> HardwareProfile:
        """Measure everything."""
        capacity = capacities(self.device, self.offload_dir, memory_limits().free)
        if self.unified:
            capacity[Tier.DEVICE] = capacity[Tier.HOST]
        links = self._links()
        with steadied(self.computing.slowness):
            memory = self._memory()
            self._measure_products()
            attending = self._attention()
            self._measure_products()
            elementwise, logits, append, unpack = (
                self._elementwise(), self._logits(), self._append(), self._unpack(),
            )  # fmt: skip
            self._measure_products()
        slowdown = measure_slowdown(self.tiers, self._begin("slowdown"), self.scope.disk_bytes // 2)
        rates = {form: grid(points) for form, points in self.products.items()}
        profile = HardwareProfile(
            name=profile_name(self.name),
            kind=ProfileKind.MEASURED,
            source="run_helm.py profile",
            machine=identity(self.name),
            unified=self.unified,
            capacity=capacity,
            memory_bandwidth=memory,
            links=tuple(measured.link for measured in links),
            products=rates,
            attention=attending,
            elementwise=elementwise,
            logits=logits,
            kv_append=append,
            unpack=unpack,
            overheads=self._overheads(rates, elementwise, logits),
            slowdown=slowdown,
            pace=Pace(*self.computing.nominal, *self.reading.nominal),
            notes={
                "seconds": round(time.perf_counter() - begin, 1),
                "measured_at": time.strftime("%Y-%m-%d"),
                "software": software(),
                "spreads": {name: round(value, 3) for name, value in self.spreads.items()},
                "disk_io": self.tiers.pool.describe(),
            },
        )
        return self._whole(profile, Pace(*self.computing.usual, *self.reading.usual))

    def _whole(self, profile: HardwareProfile, mean: Pace) -> HardwareProfile:
        """The profile at the mean pace, with what decoding takes beyond its parts."""
        self._begin("whole passes")
        beyond = decoding_beyond_parts(
            self.name, self.offload_dir, profile, self.yardstick, self.scope.whole, 2 * self.scope.passes
        )
        found = at_pace(profile, replace(mean, few=mean.few / beyond))
        return replace(found, pace=mean, notes={**profile.notes, "decoding_beyond_parts": round(beyond, 3)})

    def _begin(self, what: str) -> float:
        self.on_step(what)
        return _SHARES.get(what, 0.0) * self.seconds

    def _note(self, what: str, *timings: Timing | Transfers) -> None:
        self.spreads[what] = max(self.spreads.get(what, 0.0), *(timing.spread for timing in timings))

    def _memory(self) -> dict[Tier, float]:
        share, size = self._begin("memory"), self.scope.memory_bytes
        host = layers.measure_memory(torch.device("cpu"), share, size)
        self._note("memory", host)
        found = {Tier.HOST: size / host.seconds, Tier.DEVICE: size / host.seconds}
        if self.device.type == "cuda":
            found[Tier.DEVICE] = size / layers.measure_memory(self.device, share, size).seconds
        return found

    def _links(self) -> list[Transfers]:
        share = self._begin("disk")
        with steadied(self.reading.slowness):
            found = measure_disk(self.tiers, share, self.scope.disk_bytes, self.scope.sizes)
        if not self.unified:
            found += measure_copies(self.tiers, self._begin("copies"), self.scope.sizes)
        for measured in found:
            self._note(f"{measured.link.source} to {measured.link.target}", measured)
        return found

    def _measure_products(self) -> None:
        """One of a few rounds, some time apart, as the speed of a machine may drift within minutes."""
        share = self._begin("products") / _ROUNDS
        for one in products.measure_products(
            self.device, share, self.scope.rows, self.scope.shapes, self.scope.forms,
            on_form=lambda form: self.on_step(f"products of {form}"), warm_up=not self.products,
        ):  # fmt: skip
            point = float(one.rows), float(one.outputs * one.inputs)
            flops = 2.0 * one.rows * one.outputs * one.inputs
            key = one.precision.product_of(one.form)
            self.products.setdefault(key, {}).setdefault(point, []).append(flops / one.timing.seconds)
            self._note(f"products of {one.form}", one.timing)

    def _attention(self) -> AttentionRates:
        share, scope = self._begin("attention"), self.scope
        prompts = attention.measure_prompts(self.device, self.dtype, share / 4, scope.lengths)
        self._note("attention of prompts", *(timing for _, timing in prompts.values()))
        forms = self._kv_forms()
        part = 0.75 * share / (len(forms) * len(scope.sharing) * (1 if self.unified else 2))
        device: dict[str, RateTable] = {}
        host: dict[str, RateTable] = {}
        places: list[tuple[dict[str, RateTable], torch.device, int | None]] = [(device, self.device, None)]
        if not self.unified and native.available():
            places.append((host, torch.device("cpu"), threads_beside(self.device)))
        for form, sharing, (tables, where, threads) in itertools.product(forms, scope.sharing, places):
            setup = attention.DecodeSetup(where, self.dtype, form, sharing, threads)
            times = attention.measure_decode(setup, part, scope.contexts, scope.sequences)
            tables[kv_key(self._kv_name(form), sharing)] = grid(
                {point: [flops / timing.seconds] for point, (flops, timing) in times.items()}
            )
            self._note("attention of decoding", *(timing for _, timing in times.values()))
        return AttentionRates(
            RateTable.line({length: flops / timing.seconds for length, (flops, timing) in prompts.items()}),
            device, host,
        )  # fmt: skip

    def _kv_forms(self) -> list[KVFormat | None]:
        """Formats of the KV cache to measure; None is the one computed in."""
        packed = [form for form in self.scope.kv_forms if form != self._kv_name(None)]
        return [None, *map(KVFormat.parse, packed)]

    def _kv_name(self, form: KVFormat | None) -> str:
        return str(self.dtype).removeprefix("torch.") if form is None else str(form)

    def _elementwise(self) -> RateTable:
        """What grows with the tokens; what does not is an overhead of every layer."""
        share, scope = self._begin("layers"), self.scope
        base = layers.measure_elementwise(self.device, self.dtype, 0.05, (1,), (64,))[1, 64]
        times = layers.measure_elementwise(self.device, self.dtype, share, scope.tokens, scope.widths)
        self._note("layers", *times.values())
        return grid({
            (tokens, width): [
                tokens * width / max(timing.seconds - base.seconds, _SETTLED * timing.seconds)
            ]
            for (tokens, width), timing in times.items()
        })  # fmt: skip

    def _logits(self) -> RateTable:
        times = layers.measure_logits(self.device, self.dtype, 0.01 * self.seconds, self.scope.logits)
        return RateTable.line(
            {rows: rows * layers.VOCABULARY / timing.seconds for rows, timing in times.items()}
        )

    def _append(self) -> dict[str, RateTable]:
        found = {}
        for form in self._kv_forms():
            times = attention.measure_append(
                self.device, self.dtype, form, 0.01 * self.seconds, self.scope.appended
            )
            found[self._kv_name(form)] = line(times)
        return found

    def _unpack(self) -> dict[str, RateTable]:
        share = self._begin("unpacking")
        forms = [
            form for form in self.scope.forms or products.formats(self.device) if form != self._kv_name(None)
        ]
        shapes = [
            shape for shape in self.scope.shapes if shape[1] >= shape[0] or shape == self.scope.shapes[-1]
        ]
        found = {}
        for form in forms:
            times = layers.measure_unpack(self.device, self.dtype, form, share / len(forms), shapes)
            found[form] = line(times)
        return found

    def _overheads(
        self, rates: Mapping[str, RateTable], elementwise: RateTable, logits: RateTable
    ) -> Overheads:
        """Overheads of real passes: what they take beyond what the rates predict."""
        self._begin("overheads")
        form = "float16" if "float16" in rates else next(iter(rates))
        table, hidden = rates[form], self.scope.hidden
        head = overheads.VOCABULARY * hidden
        known = {
            rows: sum(
                2.0 * rows * out * wide / table.at(rows, out * wide)
                for out, wide in overheads.matrices(hidden)
            )
            + rows * hidden / elementwise.at(rows, hidden)
            for rows in (overheads.FEW, overheads.MANY)
        }
        known[0] = 2.0 * head / table.at(1, head) + overheads.VOCABULARY / logits.at(1)
        small = overheads.SmallModel(
            self.name, self.offload_dir, self.scope.passes, hidden, self.computing.slowness
        )
        return overheads.measure_overheads(small, self.tiers, known)


def grid(points: Mapping[tuple[float, float], list[float]]) -> RateTable:
    """A table of rates at all points of a grid; several rates at one point count as their harmonic mean."""
    xs = tuple(sorted({float(x) for x, _ in points}))
    ys = tuple(sorted({float(y) for _, y in points}))
    return RateTable(tuple(tuple(harmonic_mean(points[x, y]) for y in ys) for x in xs), xs, ys)


def line(times: Mapping[int, Timing]) -> RateTable:
    """Values per second, from seconds by the number of values."""
    return RateTable.line({values: values / timing.seconds for values, timing in times.items()})
