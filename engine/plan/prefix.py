"""Which prefixes requests share, and in which order the requests are admitted.

The prompts of a call form a tree: two that begin alike share a path from its root. A stretch of that path
which it pays to compute once is a *segment*; a request attends to a chain of segments and then computes the
tokens that are its own, of which one that is only scored may have none. Long stretches are cut, so that no
pass has to take more tokens than a device batch may have. Requests are ordered so that those of one segment
are neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.spec.policy import Policy
from engine.spec.request import Request

LEAST_SAVED = 4
"""Tokens that a segment has to save over all its branches; a smaller one costs more than it saves."""

LEAST_SAVED_GENERATING = 16
"""The same where tokens are generated behind it: it is attended to in every pass, not in one."""

SHORTEST_CUT = 32
"""Tokens: stretches are not cut into shorter parts than this."""


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens that is computed once for all requests that go through it."""

    parent: int | None
    """The segment that comes before it, by its place in `Arrangement.segments`; None at the beginning."""

    begin: int
    """Position of its first token."""

    tokens: tuple[int, ...]

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.begin + len(self.tokens)


class Entry(NamedTuple):
    """What waits for a slot: a request, or a segment for the one pass that computes it."""

    place: int
    """Index of the request, or of the segment in `Arrangement.segments`."""

    is_segment: bool


@dataclass(frozen=True)
class Arrangement:
    """Segments, and the requests in the order in which they are admitted."""

    segments: tuple[Segment, ...]
    """Parents before their children."""

    order: tuple[int, ...]
    """Indices of the requests."""

    inner: tuple[int | None, ...]
    """Per request the last segment that it goes through; None for none."""

    distinct: int
    """Nodes of the tree, a token each: what has to be computed at least once to answer all the requests."""

    def begin(self, request: int) -> int:
        """Position of the first token that is the request's own."""
        inner = self.inner[request]
        return 0 if inner is None else self.segments[inner].end

    def chain(self, segment: int | None) -> list[int]:
        """A segment and those before it, the first one first."""
        found: list[int] = []
        while segment is not None:
            found.append(segment)
            segment = self.segments[segment].parent
        return found[::-1]

    def queue(self) -> Iterator[Entry]:
        """What is admitted, in this order: every segment right before the first request through it."""
        begun: set[int] = set()
        for request in self.order:
            for segment in self.chain(self.inner[request]):
                if segment not in begun:
                    begun.add(segment)
                    yield Entry(segment, is_segment=True)
            yield Entry(request, is_segment=False)

    def most_alive(self, block_size: int) -> list[int]:
        """Tokens of the most segments that can be in the prefix cache at once, while a block is computed.

        Kept are the chains of those that have a slot and of the first one that waits: of no level more
        segments than that.
        """
        levels: list[int] = []
        tokens: dict[int, list[int]] = {}
        for segment in self.segments:
            levels.append(0 if segment.parent is None else levels[segment.parent] + 1)
            tokens.setdefault(levels[-1], []).append(len(segment.tokens))
        largest = (sorted(lengths, reverse=True)[: block_size + 1] for lengths in tokens.values())
        return [length for lengths in largest for length in lengths]


UNSHARED = Arrangement((), (), (), 0)
"""Of lengths alone, which share nothing."""


@dataclass
class _Node:
    """A fork of the tree, or the end of a prompt."""

    depth: int
    sample: int
    """A request that goes through it."""

    first: tuple[int, int]
    """The least (rank, index) of the requests below it."""

    generates: bool = False
    """Whether any of them generates tokens."""

    children: list[_Node] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)

    def adopt(self, child: _Node) -> None:
        """Take a finished node as a child."""
        self.children.append(child)
        self.first = min(self.first, child.first)
        self.generates |= child.generates


def padding_of(inputs: int, policy: Policy) -> int:
    """Padding tokens of a prompt of ``inputs`` tokens."""
    return -inputs % policy.padding if policy.padding else 0


def arrange_requests(requests: Sequence[Request], policy: Policy) -> Arrangement:
    """Shared prefixes and order of requests: those that may take the most passes begin first."""
    inputs = [request.computed_tokens for request in requests]
    ranks = [-request.max_new_tokens if policy.refill else 0 for request in requests]
    generating = [request.max_new_tokens > 0 for request in requests]
    return arrange(inputs, ranks, generating, policy.shares_prefixes, policy.max_batch_tokens)


def arrange(
    prompts: Sequence[Sequence[int]],
    ranks: Sequence[int],
    generating: Sequence[bool],
    share: bool,
    most_tokens: int,
) -> Arrangement:
    """Find the segments and the order.

    Args:
        prompts: per request the tokens to compute before the first one is generated, at least one.
        ranks: requests of lower rank are admitted first, where no segment keeps neighbours together.
        generating: whether tokens are generated. Then the last one computed is always the request's own: what
            comes after it is asked of this request alone.
        share: whether there may be segments.
        most_tokens: no stretch is longer, but for `SHORTEST_CUT`.
    """
    inputs = [tuple(prompt) for prompt in prompts]
    by_tokens = sorted(range(len(inputs)), key=inputs.__getitem__)
    common = [0] * len(inputs)
    for place, (before, after) in enumerate(itertools.pairwise(by_tokens), start=1):
        common[place] = _common(inputs[before], inputs[after])
    distinct = sum(map(len, inputs)) - sum(common)
    if not share:
        order = sorted(range(len(inputs)), key=lambda request: (ranks[request], request))
        return Arrangement((), tuple(order), (None,) * len(inputs), distinct)
    shareable = [len(prompt) - generates for prompt, generates in zip(inputs, generating, strict=True)]
    root = _tree(shareable, ranks, generating, by_tokens, common)
    segments: list[Segment] = []
    inner: list[int | None] = [None] * len(inputs)
    order = []
    cut = max(most_tokens, SHORTEST_CUT)
    for item, parent in _walk(root, inputs, ranks, segments, cut):
        begin = 0 if parent is None else segments[parent].end
        inner[item] = _append(segments, parent, inputs[item][begin:], cut, keep_last=True)
        order.append(item)
    return Arrangement(tuple(segments), tuple(order), tuple(inner), distinct)


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _tree(
    shareable: Sequence[int], ranks: Sequence[int], generating: Sequence[bool], by_tokens: Sequence[int],
    common: Sequence[int],
) -> _Node:  # fmt: skip
    """The tree of what may be shared: of prompt i its first ``shareable[i]`` tokens."""
    root = _Node(0, -1, (max(ranks, default=0) + 1, 0))
    stack = [root]
    before = 0  # shareable tokens of the prompt before
    for request, shared in zip(by_tokens, common, strict=True):
        own = shareable[request]
        fork, before = min(shared, before, own), own
        while stack[-1].depth > fork:
            node = stack.pop()
            if stack[-1].depth < fork:
                stack.append(_Node(fork, node.sample, node.first))
            stack[-1].adopt(node)
        if own > stack[-1].depth:
            stack.append(_Node(own, request, (ranks[request], request)))
        stack[-1].requests.append(request)
        stack[-1].first = min(stack[-1].first, (ranks[request], request))
        stack[-1].generates |= generating[request]
    while len(stack) > 1:
        node = stack.pop()
        stack[-1].adopt(node)
    return root


def _walk(
    root: _Node, inputs: Sequence[tuple[int, ...]], ranks: Sequence[int], segments: list[Segment], cut: int
) -> Iterator[tuple[int, int | None]]:
    """Requests in their order, each with the last segment that it shares; adds segments as it meets them."""
    todo: list[tuple[_Node | int, int | None]] = [(root, None)]
    while todo:
        item, parent = todo.pop()
        if isinstance(item, int):
            yield item, parent
            continue
        begin = 0 if parent is None else segments[parent].end
        branches = len(item.children) + len(item.requests)
        least = LEAST_SAVED_GENERATING if item.generates else LEAST_SAVED
        if (branches - 1) * (item.depth - begin) >= least:
            parent = _append(segments, parent, inputs[item.sample][begin : item.depth], cut)
        branch: list[tuple[tuple[int, int], _Node | int]] = [(child.first, child) for child in item.children]
        branch += [((ranks[request], request), request) for request in item.requests]
        branch.sort(key=lambda entry: entry[0], reverse=True)
        todo += [(entry, parent) for _, entry in branch]


def _append(
    segments: list[Segment], parent: int | None, tokens: tuple[int, ...], cut: int, keep_last: bool = False
) -> int | None:
    """Add a stretch behind a segment, in parts of at most ``cut`` tokens; returns the last segment.

    With ``keep_last`` what is left at the end, less than a part, becomes no segment.
    """
    begin = 0 if parent is None else segments[parent].end
    rest = len(tokens) if not keep_last else max(0, -(-len(tokens) // cut) - 1) * cut
    for start in range(0, rest, cut):
        segments.append(Segment(parent, begin + start, tokens[start : min(start + cut, rest)]))
        parent = len(segments) - 1
    return parent
