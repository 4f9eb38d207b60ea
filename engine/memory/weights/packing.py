"""From a checkpoint's numbers to the bytes that a weight is kept in."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.kernels import ops
from engine.kernels.calls import PackedMatrix
from engine.memory.weights.smoothing import Smoothing
from engine.spec.float_format import FloatSpec
from engine.spec.layout import KeptWeight


def kept_shape(kept: KeptWeight) -> tuple[int, ...]:
    """Shape of a weight as it is kept: its own, or blocks of bytes."""
    if kept.form is None:
        return kept.tensor.shape
    rows, width = kept.tensor.matrix
    return kept.form.blocks(rows), kept.form.block_bytes(width)


def as_kept(
    kept: KeptWeight, value: Tensor | PackedMatrix, smoothing: Smoothing | None = None
) -> tuple[Tensor, Tensor | None]:
    """A weight of `kept_shape`, contiguous, and what divides its activations (see `Smoothing`).

    Raises:
        CheckpointError: if the weight cannot be packed.
    """
    if isinstance(value, PackedMatrix):
        return value.data, None
    if kept.form is None:
        return value.to(getattr(torch, kept.dtype)).contiguous(), None
    tensor = kept.tensor
    if isinstance(kept.form, FloatSpec):
        numbers = value.to(getattr(torch, kept.form.dtype)).contiguous()
        return numbers.view(torch.uint8).view(kept_shape(kept)), None
    matrix = value.t() if tensor.transposed else value.reshape(tensor.matrix)
    scale = None
    if smoothing is not None and kept.form.activation_bits != 16:
        scale, matrix = smoothing.apply(matrix.float())
    try:
        packed = torch.empty(kept_shape(kept), dtype=torch.uint8)
        return ops.pack(matrix.contiguous(), kept.form, packed), scale
    except ValueError as error:
        raise CheckpointError(f"tensor {tensor.name!r} cannot be compressed: {error}") from error
