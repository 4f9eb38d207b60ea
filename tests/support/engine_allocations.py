"""Measures the bytes of live CPU tensors by watching every operation of one thread.

Tensors that this thread never touches (another thread's, scratch memory inside a kernel) are not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COMPOSED = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
)


@dataclass
class Moment:
    """The moment at which live bytes came closest to what the ledger allowed, or exceeded it most."""

    live: int = 0
    allowed: int = 0
    operation: str = ""

    @property
    def excess(self) -> int:
        """Bytes beyond what was allowed; negative if some were left."""
        return self.live - self.allowed


class LiveBytes(TorchDispatchMode):
    """Lets a test compare real tensor memory with the ledger's books, at every operation.

    A storage counts from the operation in which it first appears until its last reference is gone.

    Attributes:
        live: bytes of live CPU storages now.
        peak: maximum of ``live``.
        tightest: the moment at which ``live`` minus the allowed bytes was largest.
    """

    def __init__(self, allowed: Callable[[], int]) -> None:
        """``allowed`` returns the bytes that the ledger has on its books at this moment."""
        super().__init__()
        self._allowed = allowed
        self._known: dict[int, int] = {}
        self.live = self.peak = 0
        self.tightest: Moment | None = None

    def begin(self) -> None:
        """Forget the peak and the tightest moment so far; live storages stay counted."""
        self.peak, self.tightest = self.live, None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, then count the storages that are new."""
        kwargs = kwargs or {}
        if func in _COMPOSED:
            with self:  # consists of other operations, whose temporaries count
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        fresh = False
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                fresh |= self._count(leaf)
        if fresh:
            allowed = self._allowed()
            if self.tightest is None or self.live - allowed > self.tightest.excess:
                self.tightest = Moment(self.live, allowed, str(func))
        return out

    def _count(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return False
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)
        return True

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size
