"""Requests take seats of the block, and leave them when they are finished.

A seat freed by a finished sequence goes to the next waiting request at the next pass, so prefill,
decode and scoring share passes. A prefix that requests share takes a seat for the one pass that computes it,
in a device batch no later than that of the first request behind it. This module does not know tensors.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from engine.memory.kv.prefix import PrefixBatch, PrefixRoom, PrefixUse
from engine.plan.prefix import Arrangement
from engine.runtime.sequences import Fed, Prefix, PrefixFeed, Sequence
from engine.spec.policy import Policy
from engine.spec.request import Request


def prefix_batch(batch: Seq[Fed], device: torch.device) -> PrefixBatch | None:
    """What a device batch has to do with prefixes; None for nothing."""
    starts = itertools.accumulate((len(fed.fresh) for fed in batch), initial=0)
    computed: dict[int, PrefixRoom] = {}
    users: dict[tuple[int, bool], tuple[Prefix, list[int], list[int]]] = {}
    total = sum(len(fed.fresh) for fed in batch)
    for index, (fed, start) in enumerate(zip(batch, starts, strict=False)):
        if isinstance(fed, PrefixFeed):
            assert fed.prefix.room is not None
            computed[index] = fed.prefix.room
        if not fed.chain:
            continue
        positions = [fed.position(offset) for offset in range(len(fed.fresh))]
        for prefix in fed.chain:
            _, places, whose = users.setdefault((id(prefix), fed.done == 0), (prefix, [], []))
            places += range(start, start + len(fed.fresh))
            whose += positions
    if not computed and not users:
        return None
    uses = []
    for (_, exact), (prefix, places, whose) in users.items():
        assert prefix.room is not None
        where = None if len(places) == total else torch.tensor(places, device=device)
        uses.append(
            PrefixUse(prefix.room, prefix.segment.begin, exact, where, torch.tensor(whose, device=device))
        )
    return PrefixBatch(computed, uses)


class Block:
    """The seats of a policy, grouped in device batches, and the requests that wait for one."""

    def __init__(self, requests: Seq[Request], policy: Policy, arrangement: Arrangement) -> None:
        self._policy, self._requests = policy, requests
        self._waiting = deque(arrangement.order)
        self._prefixes: list[Prefix] = []
        for segment in arrangement.segments:
            parent = None if segment.parent is None else self._prefixes[segment.parent]
            self._prefixes.append(Prefix(segment, parent))
        self._inner = [None if inner is None else self._prefixes[inner] for inner in arrangement.inner]
        for request, inner in zip(requests, self._inner, strict=True):
            self._join(request, inner)
        self.riders: list[Sequence] = []
        """Requests without tokens of their own, which are answered when their prefixes are computed."""

        self.batches: list[list[Fed]] = [[] for _ in range(policy.num_device_batches)]
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
    def active(self) -> list[Fed]:
        """What is on its way, batch after batch."""
        return [fed for batch in self.batches for fed in batch]

    def refill(self, admit: Callable[[Fed], None]) -> None:
        """Seat what waits, in order, where there is a seat and room for its tokens.

        Args:
            admit: called with what takes a seat, to make room for it in the KV cache.
        """
        if not self._policy.refill and any(self.batches):
            return
        for batch, free in zip(self.batches, self._free, strict=True):
            tokens = sum(len(fed.fresh) for fed in batch)
            has_prompt = False
            while free and self._waiting:
                fed = self._next(free[0])
                if isinstance(fed, Sequence) and not fed.fresh:
                    self._seat(fed)
                    self.riders.append(fed)
                    continue
                count = len(fed.fresh)
                if has_prompt and tokens + count > self._policy.max_batch_tokens:
                    break
                if tokens + count > max(self._policy.max_batch_tokens, count + self._policy.device_batch - 1):
                    break
                free.pop(0)
                self._seat(fed)
                admit(fed)
                batch.append(fed)
                tokens, has_prompt = tokens + count, True

    def _next(self, seat: int) -> Fed:
        """What is to be fed next: the first waiting request, or its first prefix that is not computed."""
        index = self._waiting[0]
        inner = self._inner[index]
        for prefix in inner.chain if inner else ():
            if not prefix.started:
                before = prefix.parent.chain if prefix.parent else []
                return PrefixFeed(seat, list(prefix.segment.tokens), before, prefix=prefix)
        return Sequence.of(index, self._requests[index], seat, inner, self._policy)

    def _seat(self, fed: Fed) -> None:
        if isinstance(fed, PrefixFeed):
            fed.prefix.started = True
            return
        self._waiting.popleft()
        for prefix in fed.chain:
            prefix.waiting -= 1
            prefix.users += 1

    def leave(self, fed: Fed) -> list[Prefix]:
        """Free a seat; returns the prefixes that nobody needs any more."""
        if isinstance(fed, Sequence) and fed in self.riders:
            self.riders.remove(fed)
        else:
            batch = fed.seat // self._policy.device_batch
            self.batches[batch].remove(fed)
            self._free[batch].append(fed.seat)
            self._free[batch].sort()
        if isinstance(fed, PrefixFeed):
            return []
        for prefix in fed.chain:
            prefix.users -= 1
        return [prefix for prefix in fed.chain if not prefix.users and not prefix.waiting]
