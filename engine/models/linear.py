"""Modules that compute from packed weights: products, GPT-2's transposed products, embeddings.

`install_linear` replaces the `forward` of a model's linear layers and embeddings, by giving the modules a
subclass. They keep their parameters and their place in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.kernels.backend import Kernels, kernels_for
from engine.kernels.calls import PackedMatrix, RowSource
from engine.spec.precision import MatmulPrecision

PACKED = "packed_weight"
"""Attribute of a module that holds its packed weight while a stage runs."""


class PackedLinear(nn.Linear):
    """A linear layer whose weight may be packed."""

    kernels: Kernels
    precision: MatmulPrecision

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        matrix: PackedMatrix | None = self.__dict__.get(PACKED)
        if matrix is None:
            return self.kernels.linear(x, self.weight, self.bias, self.precision)
        return self.kernels.matmul(x, matrix, self.bias, self.precision)


class PackedConv1D(Conv1D):
    """The same with a weight that is kept as [inputs, outputs] while it is not packed."""

    kernels: Kernels
    precision: MatmulPrecision

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        matrix: PackedMatrix | None = self.__dict__.get(PACKED)
        if matrix is None:
            return super().forward(x)
        return self.kernels.matmul(x, matrix, self.bias, self.precision)


class PackedEmbedding(nn.Embedding):
    """An embedding whose table may be packed, or stay in its tier."""

    kernels: Kernels
    dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:  # [...] -> [..., width]
        matrix: PackedMatrix | RowSource | None = self.__dict__.get(PACKED)
        if matrix is None:
            return super().forward(input)
        if isinstance(matrix, RowSource):
            return matrix.gather(input)
        return self.kernels.embedding(input, matrix, self.dtype)


_PACKED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PackedLinear,
    Conv1D: PackedConv1D,
    nn.Embedding: PackedEmbedding,
}
PACKED_MODULES = (PackedLinear, PackedConv1D, PackedEmbedding)
"""Those whose weight may be a `PackedMatrix`."""


def install_linear(
    model: nn.Module, dtype: torch.dtype, precision: MatmulPrecision = MatmulPrecision.HIGHEST
) -> None:
    """Replace the forward of every plain linear layer and embedding by one that takes packed weights, too.

    Subclasses are left alone: what they add to the arithmetic is not known here.
    """
    for module in model.modules():
        packed = _PACKED_CLASSES.get(type(module))
        if packed is not None:
            module.__class__ = packed
            if isinstance(module, PackedEmbedding):
                module.dtype = dtype
            elif isinstance(module, (PackedLinear, PackedConv1D)):
                module.precision = precision
    choose_kernels(model, torch.device("cpu"))


def choose_kernels(model: nn.Module, device: torch.device) -> None:
    """Choose the kernels of all these modules, for weights on ``device``."""
    kernels = kernels_for(device)
    for module in model.modules():
        if isinstance(module, PACKED_MODULES):
            module.kernels = kernels


@contextmanager
def observing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the largest magnitude of every input channel of every linear layer while the model runs.

    Yields a mapping from the weight's name to float32 [inputs] that fills as tokens pass.
    """
    largest: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().float().abs().reshape(-1, inputs[0].shape[-1]).amax(0)
            largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

        return hook

    hooks = [
        module.register_forward_pre_hook(note(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, (PackedLinear, PackedConv1D))
    ]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()
