"""Continuous batching: which waiting sequence takes which slot of the block, and when.

The one rule of it, for the engine's sequences and for the planner's, which are lengths only. A slot freed by
a finished sequence goes to the next waiting one at the next pass. This module does not know tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from engine.spec.policy import Policy


class Slotted(Protocol):
    """A sequence as the batching rule sees it."""

    slot: int

    @property
    def new_tokens(self) -> int:
        """Tokens that the next pass computes of it."""


S = TypeVar("S", bound=Slotted)


class Slots(Generic[S]):
    """The slots of a policy's block, grouped in device batches, and the sequences that have one.

    Attributes:
        batches: per device batch its sequences, in the order in which they were admitted.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        size, count = policy.device_batch, policy.num_device_batches
        self.batches: list[list[S]] = [[] for _ in range(count)]
        self._free = [list(range(batch * size, (batch + 1) * size)) for batch in range(count)]

    def admit(self, waiting: Callable[[], S | None], take: Callable[[S], object]) -> None:
        """Give free slots to waiting sequences, in their order, as long as their tokens fit in the pass.

        A device batch takes prompts of up to ``max_batch_tokens`` together, or one longer prompt; beside them
        every other slot may decode one token.

        Args:
            waiting: the sequence that is next in the queue; None if none waits.
            take: called with that sequence when it has its slot, to take it off the queue.
        """
        if not self._policy.refill and any(self.batches):
            return
        limit = self._policy.max_batch_tokens
        for batch, free in zip(self.batches, self._free, strict=True):
            if not free or (sequence := waiting()) is None:
                continue
            tokens = sum([other.new_tokens for other in batch])  # noqa: C419 - faster than a generator
            has_prompt = False
            while sequence is not None:
                count = sequence.new_tokens
                most = limit if has_prompt else max(limit, count + self._policy.device_batch - 1)
                if tokens + count > most:
                    break
                sequence.slot = free.pop(0)
                take(sequence)
                batch.append(sequence)
                tokens, has_prompt = tokens + count, True
                sequence = waiting() if free else None

    def free(self, sequence: S) -> None:
        """Free the slot of a sequence that leaves."""
        batch = sequence.slot // self._policy.device_batch
        self.batches[batch].remove(sequence)
        self._free[batch].append(sequence.slot)
        self._free[batch].sort()

    @property
    def active(self) -> list[S]:
        """All sequences that have a slot, batch after batch."""
        return [sequence for batch in self.batches for sequence in batch]
