"""FlexGen's own runtime on a machine's profile: its loops, its placement rule, its costs.

What its code does and ours does not (Sheng et al. 2023, FMInference/FlexLLMGen): attention and MLP are
visited as layers of their own; every cell (layer, batch) ends in a barrier for all streams, so that the next
layer's weights hide behind the first batch only; weights and KV cache are unpacked for every batch again,
by one elementwise operation after the other; logits are computed for all positions of a prompt; the KV
cache leaves the device through unpinned memory. Nothing here is fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.spec.hardware import Tier
from engine.spec.model import ModelSpec
from engine.spec.policy import Placement, Policy
from engine.spec.profile import HardwareProfile

PACKED_BYTES = 4.5 / 8
"""Per value: 4 bits, and scale and minimum of 16 bits for every 64 values."""

UNPACK_TRAFFIC = 19.0
"""Bytes of device memory read and written per value that is unpacked: shift, mask, join, convert, divide,
add and reshape, each its own pass."""

_ATTENTION, _MLP = (0.25, 0.25, 0.25, 0.25), (0.5, 0.5)
"""Shares of the matrices within a half layer, in its order."""


@dataclass(frozen=True)
class FlexGenRun:
    """One of FlexGen's published settings."""

    policy: Policy
    """Placements as asked, and the block."""

    prompt: int
    generated: int
    host_attention: bool = False
    packed_weights: bool = False
    packed_kv: bool = False
    overlap: bool = True


@dataclass(frozen=True)
class FlexGenTime:
    """What its runtime is simulated to take."""

    prefill_seconds: float
    decode_seconds: float
    generated: int

    @property
    def throughput(self) -> float:
        """Generated tokens per second."""
        return self.generated / (self.prefill_seconds + self.decode_seconds)


def effective(asked: Placement, shares: Sequence[float]) -> dict[Tier, float]:
    """What FlexGen's rule makes of fractions: a matrix goes where the middle of its share lies."""
    held = dict.fromkeys(Tier, 0.0)
    begin = 0.0
    for share in shares:
        middle = begin + share / 2
        if middle < asked.disk:
            tier = Tier.DISK
        elif middle < asked.disk + asked.host:
            tier = Tier.HOST
        else:
            tier = Tier.DEVICE
        held[tier] += share
        begin += share
    return held


def simulate(spec: ModelSpec, profile: HardwareProfile, run: FlexGenRun) -> FlexGenTime:
    """Walk its loops: all prompts of the block at once, then one token of each at a time."""
    walk = _Walk(spec, profile, run)
    contexts = [run.prompt + step for step in range(1, run.generated)]
    some = sorted({contexts[0], contexts[len(contexts) // 2], contexts[-1]}) if contexts else []
    times = [walk.seconds(1, context) for context in some]
    decode = len(contexts) * (sum(times) / len(times)) if times else 0.0
    return FlexGenTime(walk.seconds(run.prompt, run.prompt), decode, run.policy.block_size * run.generated)


class _Walk:
    """One pass after the other."""

    def __init__(self, spec: ModelSpec, profile: HardwareProfile, run: FlexGenRun) -> None:
        self.spec, self.profile, self.run = spec, profile, run
        self.memory = profile.memory_bandwidth[Tier.DEVICE]
        size = PACKED_BYTES if run.packed_weights else 2.0
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.halves = (
            (4 * hidden**2, size * 4 * hidden**2, effective(run.policy.weights, _ATTENTION)),
            (2 * hidden * inner, size * 2 * hidden * inner, effective(run.policy.weights, _MLP)),
        )

    def seconds(self, fresh: int, context: int) -> float:
        """One pass in which every sequence computes ``fresh`` tokens and attends to ``context``."""
        total = 0.0
        for half, (_, nbytes, tiers) in enumerate(self.halves):
            following = self.halves[1 - half]
            load = self._load(following[1], following[2])
            compute = self._compute(half, fresh, context)
            moved = self._move_kv(fresh, context) if half == 0 else ()
            moved = (*moved, *self._move_hidden(fresh))
            streams = [compute, *moved]
            if self.run.overlap:
                cells = max(load, *streams) + (self.run.policy.num_device_batches - 1) * max(streams)
            else:
                own = self._load(nbytes, tiers)
                cells = own + self.run.policy.num_device_batches * sum(streams)
            total += cells
        return self.spec.num_layers * total + self._head(fresh)

    def _load(self, nbytes: float, tiers: Mapping[Tier, float]) -> float:
        """A half layer's weights, those of the disk by way of the host."""
        up = self.profile.link(Tier.HOST, Tier.DEVICE).bandwidth.at(nbytes)
        read = self.profile.link(Tier.DISK, Tier.HOST).bandwidth.at(nbytes)
        crossing = nbytes * (tiers[Tier.HOST] + tiers[Tier.DISK]) / up
        return max(crossing, nbytes * tiers[Tier.DISK] / read)

    def _move_kv(self, fresh: int, context: int) -> tuple[float, ...]:
        """Loading the past and storing what is new, of one batch at one attention layer."""
        kv, batch = self.run.policy.kv, self.run.policy.device_batch
        each = 2 * self.spec.hidden_size * (PACKED_BYTES if self.run.packed_kv else 2.0)
        past, new = batch * (context - fresh) * each, batch * fresh * each
        off = kv.host + kv.disk
        stored = new * off / self.profile.link(Tier.DEVICE, Tier.HOST, pinned=False).bandwidth.at(new)
        written = new * kv.disk / self.profile.link(Tier.HOST, Tier.DISK).bandwidth.at(new)
        if not past:
            return stored, written
        read = past * kv.disk / self.profile.link(Tier.DISK, Tier.HOST).bandwidth.at(past)
        brought = 0.0 if self.run.host_attention else past * off
        up = brought / self.profile.link(Tier.HOST, Tier.DEVICE).bandwidth.at(past)
        return max(read, up), stored, written

    def _move_hidden(self, fresh: int) -> tuple[float, ...]:
        placed = self.run.policy.activations
        nbytes = 2 * self.spec.hidden_size * fresh * self.run.policy.device_batch * (1 - placed.device)
        if not nbytes:
            return ()
        down = nbytes / self.profile.link(Tier.DEVICE, Tier.HOST).bandwidth.at(nbytes)
        return nbytes / self.profile.link(Tier.HOST, Tier.DEVICE).bandwidth.at(nbytes), down

    def _compute(self, half: int, fresh: int, context: int) -> float:
        """One batch at one half layer."""
        batch, hidden = self.run.policy.device_batch, self.spec.hidden_size
        values, _, _ = self.halves[half]
        rows = batch * fresh
        flops = 2.0 * rows * values
        seconds = max(flops / self.profile.product("float16").at(rows, values), 2 * values / self.memory)
        seconds += rows * hidden / self.profile.elementwise.at(rows, hidden) / 2
        seconds += self.profile.overheads.per_layer / 2
        if self.run.packed_weights:
            seconds += values * UNPACK_TRAFFIC / self.memory
        if half == 0:
            seconds += self._attention(fresh, context)
        return seconds

    def _attention(self, fresh: int, context: int) -> float:
        batch, hidden, kv = self.run.policy.device_batch, self.spec.hidden_size, self.run.policy.kv
        if fresh > 1:
            seconds = 4.0 * batch * fresh * fresh * hidden / self.profile.attention.prompt.at(fresh)
        else:
            flops = 4.0 * batch * context * hidden
            there = (kv.host + kv.disk) if self.run.host_attention else 0.0
            on_device = self.profile.decoding("float16", 1).at(context, batch)
            seconds = flops * (1 - there) / on_device
            if there:
                seconds += (
                    flops * there / self.profile.decoding("float16", 1, on_host=True).at(context, batch)
                )
        if self.run.packed_kv:
            values = 2.0 * batch * hidden * (fresh if fresh > 1 else context)
            seconds += values * UNPACK_TRAFFIC / self.memory
        return seconds

    def _head(self, fresh: int) -> float:
        """Logits of all positions, for every batch of the block."""
        policy, values = self.run.policy, self.spec.vocab_size * self.spec.hidden_size
        rows = policy.device_batch * fresh
        flops = 2.0 * rows * values / self.profile.product("float16").at(rows, values)
        logits = rows * self.spec.vocab_size / self.profile.logits.at(rows)
        over = self.profile.overheads
        each = over.per_embed + over.per_head + policy.device_batch * over.per_sequence
        each += max(flops, 2 * values / self.memory) + logits
        return over.per_pass + policy.num_device_batches * each
