"""Requests take slots of the block, and leave them when they are finished.

A slot freed by a finished sequence goes to the next waiting request at the next pass, so prefill,
decode and scoring share passes. A prefix that requests share takes a slot for the one pass that computes it,
in a device batch no later than that of the first request behind it. This module does not know tensors.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence

import torch

from engine.memory.kv.prefix import PrefixBatch, PrefixRegion, PrefixUse
from engine.plan.prefix import Arrangement
from engine.runtime.sequences import Prefix, PrefixSequence, RequestSequence, SlotSequence
from engine.spec.policy import Policy
from engine.spec.request import Request


def prefix_batch(batch: Sequence[SlotSequence], device: torch.device) -> PrefixBatch | None:
    """What a device batch has to do with prefixes; None for nothing."""
    starts = itertools.accumulate((len(sequence.fresh) for sequence in batch), initial=0)
    computed: dict[int, PrefixRegion] = {}
    users: dict[tuple[int, bool], tuple[Prefix, list[int], list[int]]] = {}
    total = sum(len(sequence.fresh) for sequence in batch)
    for index, (sequence, start) in enumerate(zip(batch, starts, strict=False)):
        if isinstance(sequence, PrefixSequence):
            assert sequence.prefix.region is not None
            computed[index] = sequence.prefix.region
        if not sequence.chain:
            continue
        positions = [sequence.position(offset) for offset in range(len(sequence.fresh))]
        for prefix in sequence.chain:
            _, places, whose = users.setdefault((id(prefix), sequence.done == 0), (prefix, [], []))
            places += range(start, start + len(sequence.fresh))
            whose += positions
    if not computed and not users:
        return None
    uses = []
    for (_, exact), (prefix, places, whose) in users.items():
        assert prefix.region is not None
        where = None if len(places) == total else torch.tensor(places, device=device)
        uses.append(
            PrefixUse(prefix.region, prefix.segment.begin, exact, where, torch.tensor(whose, device=device))
        )
    return PrefixBatch(computed, uses)


class Block:
    """The slots of a policy, grouped in device batches, and the requests that wait for one."""

    def __init__(self, requests: Sequence[Request], policy: Policy, arrangement: Arrangement) -> None:
        self._policy, self._requests = policy, requests
        self._waiting = deque(arrangement.order)
        self._prefixes: list[Prefix] = []
        for segment in arrangement.segments:
            parent = None if segment.parent is None else self._prefixes[segment.parent]
            self._prefixes.append(Prefix(segment, parent))
        self._inner = [None if inner is None else self._prefixes[inner] for inner in arrangement.inner]
        for request, inner in zip(requests, self._inner, strict=True):
            self._join(request, inner)
        self.prefix_only: list[RequestSequence] = []
        """Requests without tokens of their own, which are answered when their prefixes are computed."""

        self.batches: list[list[SlotSequence]] = [[] for _ in range(policy.num_device_batches)]
        self._free = [
            list(range(batch * policy.device_batch, (batch + 1) * policy.device_batch))
            for batch in range(policy.num_device_batches)
        ]

    @staticmethod
    def _join(request: Request, inner: Prefix | None) -> None:
        for prefix in inner.chain if inner else ():
            prefix.waiting += 1
            prefix.decodes |= request.max_new_tokens > 1
            if request.prompt_logprobs:
                prefix.scored = True
                after = request.prompt[prefix.segment.end : prefix.segment.end + 1]
                prefix.following.update(dict.fromkeys(after, (0.0, False)))

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def active(self) -> list[SlotSequence]:
        """What is on its way, batch after batch."""
        return [sequence for batch in self.batches for sequence in batch]

    def refill(self, admit: Callable[[SlotSequence], None]) -> None:
        """Seat what waits, in order, where there is a slot and room for its tokens.

        Args:
            admit: called with what takes a slot, to make room for it in the KV cache.
        """
        if not self._policy.refill and any(self.batches):
            return
        for batch, free in zip(self.batches, self._free, strict=True):
            tokens = sum(len(sequence.fresh) for sequence in batch)
            has_prompt = False
            while free and self._waiting:
                sequence = self._next(free[0])
                if isinstance(sequence, RequestSequence) and not sequence.fresh:
                    self._admit_waiting(sequence)
                    self.prefix_only.append(sequence)
                    continue
                count = len(sequence.fresh)
                if has_prompt and tokens + count > self._policy.max_batch_tokens:
                    break
                if tokens + count > max(self._policy.max_batch_tokens, count + self._policy.device_batch - 1):
                    break
                free.pop(0)
                self._admit_waiting(sequence)
                admit(sequence)
                batch.append(sequence)
                tokens, has_prompt = tokens + count, True

    def _next(self, slot: int) -> SlotSequence:
        """What is to be fed next: the first waiting request, or its first prefix that is not computed."""
        index = self._waiting[0]
        inner = self._inner[index]
        for prefix in inner.chain if inner else ():
            if not prefix.started:
                before = prefix.parent.chain if prefix.parent else []
                return PrefixSequence(slot, list(prefix.segment.tokens), before, prefix=prefix)
        return RequestSequence.of(index, self._requests[index], slot, inner, self._policy)

    def _admit_waiting(self, sequence: SlotSequence) -> None:
        if isinstance(sequence, PrefixSequence):
            sequence.prefix.started = True
            return
        self._waiting.popleft()
        for prefix in sequence.chain:
            prefix.waiting -= 1
            prefix.users += 1

    def leave(self, sequence: SlotSequence) -> list[Prefix]:
        """Free a slot; returns the prefixes that nobody needs any more."""
        if isinstance(sequence, RequestSequence) and sequence in self.prefix_only:
            self.prefix_only.remove(sequence)
        else:
            batch = sequence.slot // self._policy.device_batch
            self.batches[batch].remove(sequence)
            self._free[batch].append(sequence.slot)
            self._free[batch].sort()
        if isinstance(sequence, PrefixSequence):
            return []
        for prefix in sequence.chain:
            prefix.users -= 1
        return [prefix for prefix in sequence.chain if not prefix.users and not prefix.waiting]
