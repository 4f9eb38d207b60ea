"""Measures the bytes of CPU tensors that are alive, by watching every operation of one thread.

What the watched thread never touches (another thread's tensors, scratch memory inside a kernel) is
not seen.
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
    """The tightest moment so far: the bytes alive and the bytes that were allowed then."""

    live: int = 0
    allowed: int = 0
    operation: str = ""

    @property
    def excess(self) -> int:
        """Bytes beyond what was allowed; negative where there was room."""
        return self.live - self.allowed


class LiveBytes(TorchDispatchMode):
    """Counts storages from the operation that first shows them to the last reference to them.

    Attributes:
        live: bytes of CPU storages alive now.
        peak: the most bytes that were alive at once.
        tightest: the moment at which ``live`` was highest above, or least below, what was allowed.
    """

    def __init__(self, allowed: Callable[[], int]) -> None:
        """``allowed`` tells how many bytes the ledger has on its books at this moment."""
        super().__init__()
        self._allowed = allowed
        self._known: dict[int, int] = {}
        self.live = self.peak = 0
        self.tightest: Moment | None = None

    def begin(self) -> None:
        """Forget the peak and the tightest moment so far; what is alive stays counted."""
        self.peak, self.tightest = self.live, None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, then count what it left behind."""
        kwargs = kwargs or {}
        if func in _COMPOSED:
            with self:  # made of other operations, whose temporaries count
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
