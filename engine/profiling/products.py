"""Times products of activations and weights as the engine computes them, in every format of weights.

A pass meets a layer's weights cold, as the other layers' have gone through the caches since, and so are they
met here. Knows no model: shapes are given.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels.backend import kernels_for
from engine.kernels.calls import PackedMatrix
from engine.kernels.cpu import native
from engine.profiling.timing import Timing, timed
from engine.spec.float_format import FLOAT_KINDS, FloatSpec
from engine.spec.layout import IN_MEMORY
from engine.spec.precision import VECTOR_ROWS, MatmulPrecision
from engine.spec.quant import QuantSpec
from engine.units import KIB, MIB

EXACT = ("float32", "float16", "bfloat16")
PACKED = ("2", "3", "4", "8", *(str(QuantSpec.parse(name)) for name in ("w8a8", "w4a8")))
"""Formats of weights, as a policy writes those that are packed."""

ROWS = (1, 2, 4, 5, 8, 9, 12, 16, 17, 24, 32, 33, 48, 64, 128, 512, 1024)
"""Kernels take rows in blocks of powers of 2, so that one row more may cost as a whole block: points lie on
both sides. Rates have settled at the last, where activations no longer fit the caches of a core."""

SHAPES = ((512, 512), (2048, 512), (512, 2048), (2048, 2048), (4096, 2048))
"""Outputs and inputs: of an attention block and an MLP, small and large."""

kernels_of = cache(kernels_for)
"""Chosen once for each device."""

_LEAST_POOL, _MOST_POOL = 64 * MIB, 384 * MIB
_MOST = 4096  # weights of a pool
_MANY_ROWS = 128


@dataclass(frozen=True)
class ProductTime:
    """One measured product."""

    form: str
    precision: MatmulPrecision
    rows: int
    outputs: int
    inputs: int
    timing: Timing


def make_weight(form: str, outputs: int, inputs: int, device: torch.device) -> Tensor | PackedMatrix:
    """A random weight [outputs, inputs] as the engine keeps it near the device.

    Numbers of 16 bits are a packed matrix on a CPU, whose kernels compute with them as they are, and a
    plain tensor elsewhere.
    """
    generator = torch.Generator().manual_seed(outputs + inputs)
    exact = torch.randn(outputs, inputs, generator=generator).mul_(0.02)
    if form not in EXACT:
        spec = QuantSpec.parse(form)
        data = torch.empty(spec.blocks(outputs), spec.block_bytes(inputs), dtype=torch.uint8, device=device)
        kernels_of(device).pack(exact.to(device), spec, data)
        return PackedMatrix(data, spec, outputs, inputs)
    kept = exact.to(device, getattr(torch, form))
    if form in FLOAT_KINDS and kernels_of(device).computes_packed():
        return PackedMatrix(kept.view(torch.uint8).view(outputs, -1), FloatSpec(form), outputs, inputs)
    return kept


def usual_form(device: torch.device) -> str:
    """16-bit weights where a device computes with them, else exact ones."""
    return "float16" if "float16" in formats(device) else "float32"


def random_rows(rows: int, inputs: int, device: torch.device) -> Tensor:
    """Activations [rows, inputs] for weights of the `usual_form`."""
    return torch.randn(rows, inputs).to(device, torch.float32 if device.type == "cpu" else torch.float16)


def multiply(
    x: Tensor, weight: Tensor | PackedMatrix, precision: MatmulPrecision = MatmulPrecision.HIGHEST
) -> Tensor:
    """x [..., width] times weight [rows, width], transposed, as a linear layer of the engine computes it."""
    if isinstance(weight, PackedMatrix):
        return kernels_of(x.device).matmul(x, weight, None, precision)
    return kernels_of(x.device).linear(x, weight, None, precision)


def _multiply_next(x: Tensor, weights: Iterator[Tensor | PackedMatrix], precision: MatmulPrecision) -> Tensor:
    return multiply(x, next(weights), precision)


def _precisions(device: torch.device, form: str, rows: int, shape: tuple[int, int]) -> list[MatmulPrecision]:
    """The default precision, and at a few points the others if the device is faster with them."""
    rounded = form not in EXACT and QuantSpec.parse(form).activation_bits < 16
    left_out = shape[0] != shape[1] or rows & (rows - 1) or rows <= VECTOR_ROWS
    chosen = not left_out and not rounded and device.type == "cpu"
    return [
        precision
        for precision in MatmulPrecision
        if precision is MatmulPrecision.HIGHEST or (chosen and native.gains_by(precision))
    ]


def formats(device: torch.device) -> tuple[str, ...]:
    """Formats with which products are computed on a device."""
    if device.type == "cpu" and not kernels_of(device).computes_packed():
        return ("float32", *PACKED)
    return (*EXACT, *PACKED)


@torch.inference_mode()
def measure_products(
    device: torch.device,
    seconds: float,
    rows: Sequence[int] = ROWS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    forms: Sequence[str] | None = None,
    on_form: Callable[[str], None] = lambda form: None,
    warm_up: bool = True,
) -> Iterator[ProductTime]:
    """Time every format at every shape and number of rows, in about ``seconds`` altogether."""
    chosen = formats(device) if forms is None else forms
    share = seconds / sum(
        len(_precisions(device, *point)) for point in itertools.product(chosen, rows, shapes)
    )
    for form in chosen:
        on_form(form)
        for outputs, inputs in shapes:
            pool = pool_of(form, outputs, inputs, device)
            turns = itertools.cycle(pool)  # each measurement goes on where the one before left off
            kind = pool[0].dtype if isinstance(pool[0], Tensor) else torch.float32
            if device.type == "cuda" and kind == torch.float32 and form != "float32":
                kind = torch.float16
            for count in rows:
                x = torch.randn(count, inputs).to(device, kind)
                least = 1 if count >= _MANY_ROWS else 3
                for precision in _precisions(device, form, count, (outputs, inputs)):
                    call = partial(_multiply_next, x, turns, precision)
                    timing = timed(call, share, device, least, warm_up)
                    yield ProductTime(form, precision, count, outputs, inputs, timing)


def pool_of(form: str, outputs: int, inputs: int, device: torch.device) -> list[Tensor | PackedMatrix]:
    """Weights of one shape, none of which is in a cache when its turn comes; their values do not matter."""
    first = make_weight(form, outputs, inputs, device)
    data = first.data if isinstance(first, PackedMatrix) else first
    one = data.reshape(-1).view(torch.uint8)
    apart = -(-len(one) // IN_MEMORY) * IN_MEMORY
    arena = torch.empty(
        min(_MOST, max(2, -(-_pool_bytes() // apart))), apart, dtype=torch.uint8, device=device
    )
    arena[:, : len(one)] = one
    copies = [row[: len(one)].view(data.dtype).view(data.shape) for row in arena]
    if isinstance(first, PackedMatrix):
        return [PackedMatrix(copy, first.spec, outputs, inputs) for copy in copies]
    return list(copies)


@cache
def _pool_bytes() -> int:
    """Twice the largest cache, as far as the system tells of it."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KM])", path.read_text(encoding="utf-8").strip()):
            sizes.append(int(found[1]) * {"K": KIB, "M": MIB}[found[2]])
    return min(max(2 * max(sizes), _LEAST_POOL), _MOST_POOL)
