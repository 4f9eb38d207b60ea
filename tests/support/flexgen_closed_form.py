"""The closed form of the FlexGen paper (section 4.3 and appendix A.3), with the constants of its fit.

Kept beside the simulation, which covers what it leaves out: memory bandwidth, launches, the cost of
packing, embeddings and logits, what placement achieves. GB is 2**30 bytes here, as in its authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.spec.policy import Policy
from engine.units import GIB

_T = 1e12
_DISK_READS_OF_WEIGHTS = 0.95
"""Part of the disk's bandwidth that weights reach in decoding, in the authors' code."""


@dataclass(frozen=True)
class Constants:
    """Bandwidths in bytes per second, rates in FLOP/s; the defaults are the authors' for a T4."""

    to_device: float = 12.89 * GIB
    to_host_kv: float = 0.97 * GIB
    to_host_hidden: float = 4.82 * GIB
    disk_read: float = 0.473 * GIB
    disk_write_kv_prefill: float = 0.746 * GIB
    disk_write_hidden_prefill: float = 2.015 * GIB
    disk_write_decode: float = 2.015 * GIB
    products_prefill: float = 21.24 * _T
    products_decode: float = 4.3 * _T
    attention_prefill: float = 9.97 * _T
    attention_decode: float = 0.079 * _T
    host: float = 0.0123 * _T
    host_both: float = 0.0168
    host_batch: float = 0.0328
    host_width: float = 0.0621
    """Loss of the host's rate with fewer than 64 sequences, narrower than 4096, and both."""


@dataclass(frozen=True)
class Shape:
    """A model and a workload as the closed form sees them."""

    layers: int
    hidden: int
    inner: int
    heads: int
    prompt: int
    generated: int
    device_batch: int
    num_device_batches: int
    packed_weights: bool = False
    """Divides the weights' bytes by 4, and nothing else."""

    @property
    def block(self) -> int:
        """Sequences of the block."""
        return self.device_batch * self.num_device_batches

    @property
    def layer_bytes(self) -> float:
        """Of one layer's matrices in 16 bits."""
        return (8 * self.hidden**2 + 4 * self.hidden * self.inner) / (4 if self.packed_weights else 1)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer of one block, by what carries or computes."""

    to_device: float
    to_host: float
    disk_read: float
    disk_write: float
    compute: float
    seconds: float


@dataclass(frozen=True)
class PeakBytes:
    """Most bytes in each tier."""

    device_prefill: float
    device_decode: float
    host_prefill: float
    host_decode: float
    disk: float


@dataclass(frozen=True)
class ClosedForm:
    """Both phases, the whole, and the peaks."""

    prefill: LayerTime
    decode: LayerTime
    seconds: float
    throughput: float
    peak: PeakBytes


def closed_form(shape: Shape, policy: Policy, constants: Constants | None = None) -> ClosedForm:
    """Evaluate it at a policy's fractions; its formats and block are those of ``shape``."""
    c = constants or Constants()
    prefill, decode = _prefill(shape, policy, c), _decode(shape, policy, c)
    seconds = (prefill.seconds + decode.seconds * (shape.generated - 1)) * shape.layers
    throughput = shape.block * shape.generated / seconds
    return ClosedForm(prefill, decode, seconds, throughput, _peak(shape, policy))


def _prefill(x: Shape, policy: Policy, c: Constants) -> LayerTime:
    weights, kv, hidden = _off(policy)
    states = 2 * x.prompt * x.hidden * x.block
    cache = 4 * (x.prompt + 1) * x.hidden * x.block
    up = (x.layer_bytes * weights + states * hidden) / c.to_device
    down = cache * kv / c.to_host_kv + states * hidden / c.to_host_hidden
    read = (x.layer_bytes * policy.weights.disk + states * policy.activations.disk) / c.disk_read
    write = cache * policy.kv.disk / c.disk_write_kv_prefill
    write += states * policy.activations.disk / c.disk_write_hidden_prefill
    products = x.block * x.prompt * (8 * x.hidden**2 + 4 * x.hidden * x.inner)
    compute = products / c.products_prefill + 4 * x.block * x.prompt**2 * x.hidden / c.attention_prefill
    return LayerTime(up, down, read, write, compute, max(up + read, down + write, compute))


def _decode(x: Shape, policy: Policy, c: Constants) -> LayerTime:
    weights, kv, hidden = _off(policy)
    states = 2 * x.hidden * x.block
    cache = 4 * x.block * (x.prompt + x.generated / 2) * x.hidden
    up = (x.layer_bytes * weights + states * hidden) / c.to_device
    down = states * hidden / c.to_host_hidden
    read = (cache * policy.kv.disk + states * policy.activations.disk) / c.disk_read
    read += x.layer_bytes * policy.weights.disk / (_DISK_READS_OF_WEIGHTS * c.disk_read)
    written = 4 * x.block * x.hidden * policy.kv.disk + states * policy.activations.disk
    write = written / c.disk_write_decode
    few = max(0.0, math.log2(64 / x.device_batch))
    narrow = max(0.0, math.log2(4096 / x.hidden))
    host = c.host * max(0.1, 1 + c.host_both * few * narrow - c.host_batch * few - c.host_width * narrow)
    compute = x.block * (8 * x.hidden**2 + 4 * x.hidden * x.inner) / c.products_decode
    compute += cache * (policy.kv.device / c.attention_decode + kv / host)
    return LayerTime(up, down, read, write, compute, up + max(down, read, write, compute))


def _off(policy: Policy) -> tuple[float, float, float]:
    """What is not on the device, of weights, KV cache and hidden states."""
    weights, kv, hidden = policy.weights, policy.kv, policy.activations
    return weights.host + weights.disk, kv.host + kv.disk, hidden.host + hidden.disk


def _peak(x: Shape, policy: Policy) -> PeakBytes:
    w, c, h = policy.weights, policy.kv, policy.activations
    batch, s, n, width = x.device_batch, x.prompt, x.generated, x.hidden
    whole, total = x.layer_bytes * x.layers, s + n
    states = 2 * width * x.block
    cache = 4 * total * width * x.block * x.layers
    within: float = (
        8 * batch * s * width + batch * (2 * s * width + 2 * x.heads * s**2) + 2 * batch * s * width
    )
    within += 4 * batch * s * width + 2 * batch * s * x.inner + 2 * batch * s * width
    device_prefill = whole * w.device + s * states * h.device + cache * c.device
    device_prefill += 2 * x.layer_bytes * (1 - w.device) + 2 * s * width * batch * (1 - h.device) + within
    within = 8 * batch * width + c.device * batch * (2 * width + 2 * total * width + 2 * x.heads * total)
    within += c.device * batch * (2 * total * width + 2 * width)
    within += 4 * batch * width + 2 * batch * x.inner + 2 * batch * width
    device_decode = whole * w.device + states * h.device + cache * c.device
    device_decode += 2 * x.layer_bytes * (1 - w.device) + 2 * width * batch * (1 - h.device)
    device_decode += 4 * batch * total * width * c.device + within
    host_prefill = whole * w.host + s * states * h.host + 4 * s * width * x.block * x.layers * c.host
    host_prefill += x.layer_bytes * (1 - w.device) + 2 * s * width * batch * (1 - h.device)
    host_decode = whole * w.host + states * h.host + cache * c.host
    host_decode += x.layer_bytes * w.disk + 4 * width * batch * h.disk + 8 * total * width * batch * c.disk
    host_decode += 2 * x.heads * total * batch + 2 * width * batch
    disk = whole * w.disk + s * states * h.disk + cache * c.disk
    return PeakBytes(device_prefill, device_decode, host_prefill, host_decode, disk)


def opt_shape(
    layers: int, hidden: int, heads: int, prompt: int, generated: int, policy: Policy, packed: bool = False
) -> Shape:
    """The shape of an OPT model under a policy's block."""
    batch, batches = policy.device_batch, policy.num_device_batches
    return Shape(layers, hidden, 4 * hidden, heads, prompt, generated, batch, batches, packed)
