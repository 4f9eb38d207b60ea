"""What happens while a recurrent module computes, seen while it runs on shapes alone: bytes, dependences."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at once, of those made meanwhile.

    Attributes:
        peak: the most so far.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        """Begin to count.

        Args:
            before: tensors that were there.
        """
        super().__init__()
        self.peak = self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._now -= nbytes


class Dependence(TorchDispatchMode):
    """Notes what is computed from one tensor: all storage in which some result of it lies."""

    def __init__(self, source: Tensor) -> None:
        super().__init__()
        storage = source.untyped_storage()
        self._touched = {storage._cdata: storage}  # kept, so that no other storage takes its place

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(map(self.reaches, tree_leaves((args, kwargs)))):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    storage = leaf.untyped_storage()
                    self._touched[storage._cdata] = storage
        return out

    def reaches(self, value: Any) -> bool:
        """Whether some of a tensor [...] was computed from the source, or is the source itself."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._touched


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers [...] of a module."""
    return [*module.parameters(), *module.buffers()]
