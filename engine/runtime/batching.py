"""Requests take slots of the block, and leave them when they are finished.

Prefill, decode and scoring share passes. A prefix that requests share takes a slot for the one pass that
computes it, in a device batch no later than that of the first request behind it. Who is admitted when is the
rule of `engine.plan.batching`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence

import torch

from engine.kernels.calls import PrefixRows
from engine.memory.kv.prefix import PrefixBatch, PrefixRegion, PrefixUse
from engine.plan.batching import Slots
from engine.plan.prefix import Arrangement
from engine.runtime.sequences import Prefix, PrefixSequence, RequestSequence, Score, SlotSequence
from engine.spec.policy import Policy
from engine.spec.request import Request


def prefix_batch(batch: Sequence[SlotSequence], device: torch.device) -> PrefixBatch | None:
    """Prefixes that a device batch computes or attends to; None where there are none."""
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
        rows = PrefixRows(prefix.segment.begin, where, torch.tensor(whose, device=device))
        uses.append(PrefixUse(prefix.region, rows, exact))
    return PrefixBatch(computed, uses)


class Block(Slots[SlotSequence]):
    """The sequences that have a slot, and the requests and prefixes that wait for one."""

    def __init__(self, requests: Sequence[Request], policy: Policy, arrangement: Arrangement) -> None:
        super().__init__(policy)
        self._requests = requests
        self._queue = deque(arrangement.queue())
        self._first: SlotSequence | None = None
        """The first of the queue, once it was looked at."""

        self._prefixes: list[Prefix] = []
        for segment in arrangement.segments:
            parent = None if segment.parent is None else self._prefixes[segment.parent]
            self._prefixes.append(Prefix(segment, parent))
        self._inner = [None if inner is None else self._prefixes[inner] for inner in arrangement.inner]
        for request, inner in zip(requests, self._inner, strict=True):
            self._join(request, inner)
        self.prefix_only: list[RequestSequence] = []
        """Requests without tokens of their own, which are answered when their prefixes are computed."""

    @staticmethod
    def _join(request: Request, inner: Prefix | None) -> None:
        """Count a request among the users of its prefixes, and note what it needs of them."""
        for prefix in inner.chain if inner else ():
            prefix.waiting += 1
            prefix.requests += 1
            prefix.decodes |= request.max_new_tokens > 1
            if request.prompt_logprobs:
                prefix.scored, prefix.top = True, max(prefix.top, request.prompt_top_logprobs)
                after = request.prompt[prefix.segment.end : prefix.segment.end + 1]
                prefix.following.update(dict.fromkeys(after, Score(0.0, greedy=False)))

    @property
    def has_waiting(self) -> bool:
        """Whether any request has not begun."""
        return bool(self._queue)

    def refill(self, on_admitted: Callable[[SlotSequence], None]) -> None:
        """Give free slots to what waits; see `Slots.admit`.

        Args:
            on_admitted: called with every sequence that gets a slot, to allocate its KV cache.
        """

        def take(sequence: SlotSequence) -> None:
            self._dequeue(sequence)
            on_admitted(sequence)

        self.admit(self._next, take)

    def _next(self) -> SlotSequence | None:
        """The first of the queue that needs a slot; requests without tokens of their own need none."""
        while self._first is None and self._queue:
            index, is_segment = self._queue[0]
            if is_segment:
                self._first = PrefixSequence.of(self._prefixes[index])
                break
            sequence = RequestSequence.of(index, self._requests[index], self._inner[index], self._policy)
            if sequence.fresh:
                self._first = sequence
            else:
                self._dequeue(sequence)
                self.prefix_only.append(sequence)
        return self._first

    def _dequeue(self, sequence: SlotSequence) -> None:
        """Take the first of the queue off it."""
        self._queue.popleft()
        self._first = None
        if isinstance(sequence, RequestSequence):
            for prefix in sequence.chain:
                prefix.waiting -= 1
                prefix.users += 1

    def leave(self, sequence: SlotSequence) -> list[Prefix]:
        """Free a sequence's slot; returns the prefixes that no request needs any more."""
        if isinstance(sequence, RequestSequence) and sequence in self.prefix_only:
            self.prefix_only.remove(sequence)
        else:
            self.free(sequence)
        if isinstance(sequence, PrefixSequence):
            return []
        for prefix in sequence.chain:
            prefix.users -= 1
        return [prefix for prefix in sequence.chain if not prefix.users and not prefix.waiting]
