"""Converts a checkpoint's numbers to the bytes in which a weight is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.kernels.backend import kernels_for
from engine.kernels.calls import PackedMatrix
from engine.memory.weights.smoothing import smooth
from engine.spec.float_format import FloatSpec
from engine.spec.layout import KeptWeight


def kept_shape(kept: KeptWeight) -> tuple[int, ...]:
    """Shape of a weight as it is kept: its own, or [blocks, block bytes] if it is packed."""
    if kept.form is None:
        return kept.tensor.shape
    rows, width = kept.tensor.matrix
    return kept.form.blocks(rows), kept.form.block_bytes(width)


def as_kept(
    kept: KeptWeight, value: Tensor | PackedMatrix, largest: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A weight as it is kept, and what divides its activations (see `smooth`).

    Args:
        value: of the shape of the checkpoint's tensor, or packed already.
        largest: [width], statistics of the activations; None if no outliers are moved.

    Returns:
        The contiguous weight of `kept_shape`, and the divisor [width] or None.

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
    if largest is not None and kept.form.activation_bits != 16:
        scale, matrix = smooth(matrix.float(), largest)
    try:
        packed = torch.empty(kept_shape(kept), dtype=torch.uint8)
        return kernels_for(packed.device).pack(matrix.contiguous(), kept.form, packed), scale
    except ValueError as error:
        raise CheckpointError(f"tensor {tensor.name!r} cannot be compressed: {error}") from error
