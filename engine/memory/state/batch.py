"""What recurrent modules see of the state: the sequences of a device batch, at one layer after the other.

Sequences that decode are computed together where their records lie in one storage. Prompts are computed one
by one, in the order of the batch: a shared prefix is computed before those that go on behind it.

Axes: S sequences that are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels.calls import StateGroup
from engine.memory.state.records import States, copies, empty, keep, views
from engine.spec.hardware import Tier
from engine.spec.layout import is_near
from engine.spec.state_layout import StateLayer

Rows = slice | Tensor
"""Some records of a storage."""

Storage = Tier | None
"""Where records lie: in a tier that the device reads, or None for the buffer to which they were brought."""


@dataclass(eq=False)
class StateRegion:
    """Where one sequence's state is kept, at all layers."""

    tier: Tier
    row: int
    """Which record of its tier."""

    tokens: int
    """After which nothing reads it any more."""


@dataclass(eq=False)
class Snapshot:
    """The state at the end of a shared prefix, as it was computed, near the device."""

    data: Tensor
    """uint8, all layers one after the other."""


@dataclass(frozen=True)
class StateUse:
    """What a sequence has to do with state in a pass."""

    first: int
    """Place of its first token that is no padding, among those of the device batch."""

    tokens: int
    """That are no padding."""

    region: StateRegion | None
    """None where no later pass goes on with it."""

    has_past: bool
    """Whether its state is that of earlier passes."""

    source: Snapshot | None = None
    """The state that it begins with."""

    target: Snapshot | None = None
    """Where it leaves its own, of a prefix that is computed."""

    is_last: bool = False
    """Whether nothing goes on with it after this pass."""


@dataclass(frozen=True)
class _Together:
    """Sequences that decode at once."""

    storage: Storage
    rows: Rows
    places: Rows
    count: int


class StateBatch:
    """The sequences of a device batch, as they are computed at every layer of a pass."""

    def __init__(self, uses: Sequence[StateUse], unified: bool, device: torch.device) -> None:
        far = [use for use in uses if use.region is not None and not is_near(use.region.tier, unified)]
        self.moved: Sequence[tuple[StateRegion, StateUse]] = sorted(
            ((use.region, use) for use in far if use.region is not None),
            key=lambda item: (list(Tier).index(item[0].tier), item[0].row),
        )
        """Those whose records are brought to the device, in the order in which they lie there."""

        self._at = {id(use): index for index, (_, use) in enumerate(self.moved)}
        decoding = [use for use in uses if use.has_past and use.tokens == 1]
        self.alone = [use for use in uses if not (use.has_past and use.tokens == 1)]
        self.together: list[_Together] = []
        for storage in dict.fromkeys(self.place_of(use)[0] for use in decoding):
            found = sorted(
                (self.place_of(use)[1], use.first) for use in decoding if self.place_of(use)[0] is storage
            )
            rows, places = zip(*found, strict=True)
            self.together.append(
                _Together(storage, _picked(rows, device), _picked(places, device), len(found))
            )

    def place_of(self, use: StateUse) -> tuple[Storage, int]:
        """Where the record of a sequence that has one lies."""
        if id(use) in self._at:
            return None, self._at[id(use)]
        assert use.region is not None
        return use.region.tier, use.region.row


def _picked(indices: Sequence[int], device: torch.device) -> Rows:
    """Ascending or other indices, as a slice where they follow each other."""
    if list(indices) == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[0] + len(indices))
    return torch.tensor(indices, device=device)


class BatchStates:
    """The `LayerStates` of one device batch at one layer."""

    def __init__(
        self,
        batch: StateBatch,
        layer: StateLayer,
        exact: StateLayer,
        records: Callable[[Storage], Tensor],
        snapshot: Callable[[Snapshot], Tensor],
    ) -> None:
        """Take what the store knows of the layer.

        Args:
            exact: the layer as snapshots have it.
            records: the records uint8 [n, bytes] of a storage at this layer.
            snapshot: the record uint8 [1, bytes] of a snapshot at this layer.
        """
        self._batch, self._layer, self._exact = batch, layer, exact
        self._records, self._snapshot = records, snapshot

    def groups(self, module: int) -> Iterator[StateGroup]:
        """What the layer's recurrent module ``module`` computes; see `engine.models.recurrent`."""
        layer = self._layer
        for some in self._batch.together:
            records = self._records(some.storage)
            chosen = records[some.rows]
            in_place = layer.is_exact and isinstance(some.rows, slice)
            states = (views if in_place else copies)(chosen, layer, module)
            yield StateGroup(some.places, some.count, 1, states, has_past=True)
            if in_place:
                continue
            keep(states, chosen, layer, module)
            if not isinstance(some.rows, slice):  # what was chosen is a copy
                records[some.rows] = chosen
        for use in self._batch.alone:
            yield from self._alone(use, module)

    def _alone(self, use: StateUse, module: int) -> Iterator[StateGroup]:
        """A prompt, or a prefix that is computed."""
        layer, home = self._layer, None
        if use.target is not None:
            states = views(self._snapshot(use.target), self._exact, module)
        elif use.region is not None:
            storage, row = self._batch.place_of(use)
            home = self._records(storage)[row : row + 1]
            if layer.is_exact:
                states, home = views(home, layer, module), None
            elif use.has_past:
                states = copies(home, layer, module)
            else:
                states = empty(1, layer, module, home.device)
        elif use.source is not None:
            states = empty(1, layer, module, use.source.data.device)
        else:
            states = {}  # nothing goes on with it
        if use.source is not None:
            begin: States = views(self._snapshot(use.source), self._exact, module)
            for key, state in begin.items():
                states[key].copy_(state)
        places = slice(use.first, use.first + use.tokens)
        yield StateGroup(places, 1, use.tokens, states, use.has_past or use.source is not None)
        if home is not None:
            keep(states, home, layer, module)
