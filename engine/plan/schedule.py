"""The order of a pass as data: which step runs on which stream, after which other steps.

A pass visits *cells* (stage, batch), stage by stage and within a stage batch by batch (the paper's
zig-zag block schedule, Algorithm 1). Each cell has up to eight steps. FlexGen's loops differ only in
how far loads run ahead; here one generator yields all of them: with ``lookahead=0`` the sequential
schedule, with 1 the overlapped one, where the next stage's weights and the next cell's KV cache, state
and hidden states are on their way while the present cell computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from engine.spec.layout import FIRST_STAGE_BUFFER, STAGE_BUFFERS


class Op(StrEnum):
    """What a step does."""

    LOAD_WEIGHTS = "load weights"
    LOAD_KV = "load KV"
    LOAD_STATE = "load state"
    LOAD_HIDDEN = "load hidden"
    COMPUTE = "compute"
    STORE_KV = "store KV"
    STORE_STATE = "store state"
    STORE_HIDDEN = "store hidden"


STREAMS = {
    Op.LOAD_WEIGHTS: "weights",
    Op.LOAD_KV: "kv_in",
    Op.LOAD_STATE: "kv_in",
    Op.LOAD_HIDDEN: "kv_in",
    Op.COMPUTE: "compute",
    Op.STORE_KV: "kv_out",
    Op.STORE_STATE: "kv_out",
    Op.STORE_HIDDEN: "kv_out",
}
"""The stream that carries each kind of step; the steps of one stream run in order, but see `TWO_AT_ONCE`."""

TWO_AT_ONCE = "weights"
"""A stream whose next step may begin before the last has ended, so that the disk always has requests: each of
the two has a buffer of its own."""

Key = tuple[Op, int, int]
"""(operation, stage, batch); weights are loaded for all batches at once and have batch 0."""


@dataclass(frozen=True)
class Step:
    """One action of a pass."""

    op: Op
    stage: int
    """Stage visited; ``num_stages`` and the one after it stand for the first two of the pass that follows."""

    batch: int
    buffer_index: int
    """Buffer that a load fills, or from which the computation and the store read."""

    after: tuple[Key, ...] = ()
    """Earlier steps of the same pass that must be finished, besides those before it on its stream."""

    @property
    def key(self) -> Key:
        """Identifies the step within its pass."""
        return self.op, self.stage, self.batch

    @property
    def stream(self) -> str:
        """Stream that carries it."""
        return STREAMS[self.op]

    def __str__(self) -> str:
        waits = "; ".join(f"{op} {stage}.{batch}" for op, stage, batch in self.after)
        return f"{self.stream:8} {self.op} {self.stage}.{self.batch} [{self.buffer_index}]" + (
            f" after {waits}" if waits else ""
        )


@dataclass(frozen=True)
class PassShape:
    """What a pass has to visit and which kinds of data have to be moved for it."""

    num_stages: int
    num_batches: int

    weights: tuple[bool, ...]
    """Per stage: whether it has weights that must be loaded."""

    kv: bool
    """Whether any of the block's KV cache must be loaded and stored around a computation."""

    hidden: bool
    """Whether hidden states leave the device between stages."""

    first_buffer: int = 0
    """Decides the weight buffer of stage 1; the buffers alternate on from the pass before."""

    preloaded: bool = False
    """Whether stages 0 and 1 were already brought in by the pass before."""

    prefetch_next: bool = False
    """Whether to bring in stages 0 and 1 of the next pass, so that streams work while the head computes."""

    state: tuple[bool, ...] = ()
    """Per stage: whether any of the block's recurrent state must be loaded and stored around a computation;
    empty for none at any."""

    def has_kv(self, stage: int) -> bool:
        """Only layers have a KV cache, not the embedding and the head."""
        return self.kv and 0 < stage < self.num_stages - 1

    def has_state(self, stage: int) -> bool:
        """Whether state is loaded and stored at a stage."""
        return bool(self.state) and self.state[stage]

    def needs_weights(self, stage: int) -> bool:
        """Whether this pass loads a stage's weights; those after the last are the next pass's first two."""
        if stage >= self.num_stages:
            return self.prefetch_next and self.weights[stage - self.num_stages]
        return self.weights[stage] and not (self.preloaded and stage < PREFETCHED)

    def buffer_of(self, stage: int) -> int:
        """Buffer of a stage's weights. The first stage has one of its own, so that the others alternate
        across the end of a pass."""
        if stage in (0, self.num_stages):
            return FIRST_STAGE_BUFFER
        return (self.first_buffer + stage - (stage > self.num_stages)) % STAGE_BUFFERS

    @property
    def next_first_buffer(self) -> int:
        """``first_buffer`` of the pass that follows."""
        return (self.first_buffer + self.num_stages - 1) % STAGE_BUFFERS


_KEPT = (
    (Op.LOAD_KV, Op.STORE_KV, PassShape.has_kv),
    (Op.LOAD_STATE, Op.STORE_STATE, PassShape.has_state),
)
"""What sequences keep from pass to pass: how it is brought and written back, and whether at a stage."""

PREFETCHED = 2
"""Stages of the next pass whose weights are brought in by this one."""


def schedule(shape: PassShape, lookahead: int = 1) -> Iterator[Step]:
    """Yield the steps of one pass in the order in which they are issued.

    Args:
        lookahead: how many stages' weights and how many cells' KV cache, state and hidden states are loaded
            ahead of the cell that computes; 0 is the sequential schedule, 1 the overlapped one.
    """
    cells = shape.num_stages * shape.num_batches
    issued: set[Key] = set()
    for stage in range(lookahead):
        yield from _load_weights(shape, stage)
    for cell in range(min(lookahead, cells)):
        yield from _load_cell(shape, cell)
    for cell in range(cells):
        stage, batch = divmod(cell, shape.num_batches)
        if batch == 0:
            for ahead in _loaded_at(stage, shape.num_stages, lookahead):
                yield from _load_weights(shape, ahead)
        waiting: list[Step] = []
        for step in _load_cell(shape, cell + lookahead):
            if all(key in issued or key[0] is not Op.STORE_HIDDEN for key in step.after):
                yield step
            else:  # it needs this very cell's result
                waiting.append(step)
        for step in _compute(shape, cell):
            issued.add(step.key)
            yield step
        yield from waiting


def _load_weights(shape: PassShape, stage: int) -> Iterator[Step]:
    """Bring a stage's weights into a buffer, once the stage that used it last is computed."""
    if not shape.needs_weights(stage):
        return
    stages = shape.num_stages
    before = 0 if stage == stages else stage - STAGE_BUFFERS - (stage > stages)
    free = ((Op.COMPUTE, before, shape.num_batches - 1),) if stage == stages or before > 0 else ()
    yield Step(Op.LOAD_WEIGHTS, stage, 0, shape.buffer_of(stage), free)


def _load_cell(shape: PassShape, cell: int) -> Iterator[Step]:
    """Bring what a cell needs besides weights into buffers, once the cell that used them last is computed."""
    stage, batch = divmod(cell, shape.num_batches)
    if stage >= shape.num_stages:
        return
    buffer = cell % STAGE_BUFFERS
    before = divmod(cell - STAGE_BUFFERS, shape.num_batches)
    free: tuple[Key, ...] = ((Op.COMPUTE, *before),) if cell >= STAGE_BUFFERS else ()
    for load, store, moves in _KEPT:
        if moves(shape, stage):
            users = (
                divmod(user, shape.num_batches) for user in range(cell - STAGE_BUFFERS, -1, -STAGE_BUFFERS)
            )
            last = next((user for user in users if moves(shape, user[0])), None)
            stored = () if last is None else ((store, *last),)
            yield Step(load, stage, batch, buffer, free + stored)
    if shape.hidden and stage > 0:
        yield Step(Op.LOAD_HIDDEN, stage, batch, buffer, (*free, (Op.STORE_HIDDEN, stage - 1, batch)))


def _compute(shape: PassShape, cell: int) -> Iterator[Step]:
    """Compute a cell once everything is there, and store what leaves the device."""
    stage, batch = divmod(cell, shape.num_batches)
    buffer = cell % STAGE_BUFFERS
    needs: list[Key] = []
    if shape.needs_weights(stage):
        needs.append((Op.LOAD_WEIGHTS, stage, 0))
    needs += ((load, stage, batch) for load, _, moves in _KEPT if moves(shape, stage))
    if shape.hidden and stage > 0:
        needs.append((Op.LOAD_HIDDEN, stage, batch))
    yield Step(Op.COMPUTE, stage, batch, buffer, tuple(needs))
    done = ((Op.COMPUTE, stage, batch),)
    for _, store, moves in _KEPT:
        if moves(shape, stage):
            yield Step(store, stage, batch, buffer, done)
    if shape.hidden and stage < shape.num_stages - 1:
        yield Step(Op.STORE_HIDDEN, stage, batch, buffer, done)


def _loaded_at(stage: int, stages: int, lookahead: int) -> range:
    """The stages whose weights are fetched when the computation of one begins.

    The first stage leaves both alternating buffers free, so the next two follow at once; at the last one
    the next pass begins.
    """
    if not lookahead:
        return range(stage, stage + 1)
    if stage == 0:
        return range(1, 1 + STAGE_BUFFERS)
    if stage == stages - 1:
        return range(stages, stages + PREFETCHED)
    return range(max(stage, STAGE_BUFFERS) + 1, stage + 2)
