"""The kernels of a device, chosen once: by the KV cache when it is made, by a model when it is placed.

A CPU has those in C, a CUDA device those in Triton; plain torch stands in where there is no compiler or no
Triton. All of them compute the same, as `reference` and `reference_attention` define it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from engine.kernels import choice, reference, reference_attention
from engine.kernels.calls import AttentionCall, CachedSequence, DecodeTable, PackedMatrix
from engine.kernels.cpu import native
from engine.kernels.cuda import gpu
from engine.spec.float_format import FloatSpec, MatrixForm
from engine.spec.kv_format import KVFormat
from engine.spec.layout import FUSED_ROWS
from engine.spec.precision import MatmulPrecision


@dataclass(frozen=True)
class Kernels:
    """The fastest form of each kernel on one device. Shapes are in the docstrings of those named."""

    name: str
    """For people, with the reason where it is not the fast ones."""

    pack: Callable[[Tensor, MatrixForm, Tensor], Tensor]
    """`reference.pack`."""

    unpack: Callable[[Tensor, MatrixForm, Tensor], Tensor]
    """`reference.unpack`."""

    pack_tokens: Callable[[Sequence[Tensor], KVFormat, int, int, Sequence[Tensor]], None]
    """`reference.pack_tokens`."""

    matmul: Callable[[Tensor, PackedMatrix, Tensor | None, MatmulPrecision], Tensor]
    """`reference_attention.matmul`."""

    linear: Callable[[Tensor, Tensor, Tensor | None, MatmulPrecision], Tensor]
    """x [..., width], weight [rows, width], bias [rows] or None: [..., rows]; see `choice.linear`."""

    summarise: Callable[[Tensor], tuple[Tensor, Tensor]]
    """`reference.summarise`."""

    attention: Callable[[AttentionCall, Sequence[CachedSequence], KVFormat | None], Tensor]
    """`reference_attention.attention`."""

    decode: Callable[[AttentionCall, DecodeTable, KVFormat | None], None] | None = None
    """`engine.kernels.cpu.attention.decode`; None where kernels take no addresses."""

    attend_prompts: Callable[[AttentionCall, Sequence[tuple[int, int]]], None] | None = None
    """`engine.kernels.cpu.prompts.attend_prompts`; None where it does not exist or torch is faster."""

    fused_rows: float = 0
    """Products of at most this many rows are best computed straight from packed weights."""

    def computes_packed(self, rows: int | None = None) -> bool:
        """Whether products of ``rows`` rows, or of any number, read packed weights where they lie."""
        return (math.inf if rows is None else rows) <= self.fused_rows

    def attends_exact(self, dtype: torch.dtype) -> bool:
        """Whether `attention` and `decode` are the fastest way over exact keys and values, too.

        Torch's fused attention takes one call per sequence, as cached lengths differ.
        """
        return self.decode is not None and dtype == torch.float32

    def embedding(self, ids: Tensor, matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
        """Rows of a packed matrix: ids [...] -> [..., width]; only the blocks that hold them are unpacked."""
        if isinstance(matrix.spec, FloatSpec):
            table = reference.floats(matrix.data[: matrix.rows], matrix.spec)
            return nn.functional.embedding(ids, table).to(dtype)
        blocks, places = torch.unique(ids.reshape(-1) // matrix.spec.block_rows, return_inverse=True)
        rows = torch.empty(len(blocks) * matrix.spec.block_rows, matrix.width, dtype=dtype, device=ids.device)
        self.unpack(matrix.data[blocks], matrix.spec, rows)
        own = places * matrix.spec.block_rows + ids.reshape(-1) % matrix.spec.block_rows
        return nn.functional.embedding(own, rows).view(*ids.shape, matrix.width)


def kernels_for(device: torch.device) -> Kernels:
    """The kernels of a device."""
    if device.type == "cpu" and native.available():
        faster = [precision for precision in MatmulPrecision if native.gains_by(precision)]
        return Kernels(
            f"C, faster at {' and '.join(faster)}" if faster else "C", native.pack, native.unpack,
            native.pack_tokens, native.matmul, choice.linear, native.summarise, native.attention,
            native.decode, native.attend_prompts if native.gains_by_prompts() else None, math.inf,
        )  # fmt: skip
    if device.type == "cuda" and gpu.available():
        return Kernels(
            "Triton", gpu.pack, gpu.unpack, partial(reference.pack_tokens, pack=gpu.pack), gpu.matmul,
            _torch_linear, reference.summarise, gpu.attention, fused_rows=FUSED_ROWS,
        )  # fmt: skip
    on_cpu = device.type == "cpu"
    return Kernels(
        f"torch ({native.reason() if on_cpu else 'Triton is not installed'})", reference.pack,
        reference.unpack, reference.pack_tokens, reference_attention.matmul,
        choice.linear if on_cpu else _torch_linear, reference.summarise, reference_attention.attention,
    )  # fmt: skip


def precision_of(wanted: MatmulPrecision, device: torch.device) -> MatmulPrecision:
    """The precision that a policy allows, where products gain by it on this device; float32's elsewhere."""
    return wanted if device.type == "cpu" and native.gains_by(wanted) else MatmulPrecision.HIGHEST


def prepare(device: torch.device) -> None:
    """Measure now, where it was never measured, what the first product would otherwise wait for."""
    if device.type == "cpu":
        choice.fastest(1, 1)


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, precision: MatmulPrecision) -> Tensor:
    return nn.functional.linear(x, weight, bias)
