"""Simulates a schedule: streams advance in random order, and the content of every buffer is tracked.

It is an oracle for the verifier and shares no code with it. A step takes time: other streams go on between
its begin and its end, and what it reads must not change meanwhile.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from engine.plan.schedule import Key, Op, PassShape, Step

BUFFERS = 2
FILLING = "being filled"
LOADS, STORES = (Op.LOAD_KV, Op.LOAD_STATE), (Op.STORE_KV, Op.STORE_STATE)
"""Of what sequences keep, kind by kind."""

AT_ONCE = {"weights": 2}
"""How many steps of a stream may run at once; 1 for streams that are not listed."""


class WentWrong(Exception):
    """In this order of events a step used something that was not there."""


def buffer_of(shape: PassShape, stage: int) -> int:
    """Index of a stage's weight buffer: 2 for the first stage, 0 and 1 in turn for layers and head."""
    if stage in (0, shape.num_stages):
        return BUFFERS
    later = stage if stage < shape.num_stages else stage - 1
    return (shape.first_buffer + later) % BUFFERS


class Buffers:
    """Tracks what every buffer contains, as (stage, batch) pairs, and checks each step against it."""

    def __init__(self, shape: PassShape) -> None:
        self._shape = shape
        self._weights: dict[int, object] = {}
        if shape.preloaded:
            self._weights = {buffer_of(shape, stage): stage for stage in (0, 1)}
        self._kept: dict[tuple[int, int], object] = {}  # by kind and buffer
        self._hidden: dict[int, object] = {}
        self._shelves: dict[int, object] = {}
        self._results: dict[int, object] = {}
        self._computed: set[tuple[int, int]] = set()
        self._stored: set[tuple[int, tuple[int, int]]] = set()

    def _moves(self, kind: int, stage: int) -> bool:
        return (self._shape.has_kv, self._shape.has_state)[kind](stage)

    def begin(self, step: Step) -> None:
        """Start a step: check what it reads, mark what it fills."""
        self._look(step)
        if step.op is Op.LOAD_WEIGHTS:
            self._weights[step.buffer_index] = FILLING
        elif step.op in LOADS:
            self._kept[LOADS.index(step.op), step.buffer_index] = FILLING
        elif step.op is Op.LOAD_HIDDEN:
            self._hidden[step.buffer_index] = FILLING
        elif step.op is Op.STORE_HIDDEN:
            self._shelves[step.batch] = FILLING

    def end(self, step: Step) -> None:
        """Finish a step: what it read must be unchanged; what it filled is available now."""
        cell = step.stage, step.batch
        if step.op is Op.LOAD_WEIGHTS:
            self._want(self._weights.get(step.buffer_index), FILLING, step)
            self._weights[step.buffer_index] = step.stage
        elif step.op in LOADS:
            place = LOADS.index(step.op), step.buffer_index
            self._want(self._kept.get(place), FILLING, step)
            self._kept[place] = ("past", cell)
        elif step.op in STORES:
            self._look(step)
            self._stored.add((STORES.index(step.op), cell))
        elif step.op is Op.STORE_HIDDEN:
            self._want(self._results.get(step.batch), step.stage, step)
            self._shelves[step.batch] = step.stage
        elif step.op is Op.LOAD_HIDDEN:
            self._want(self._hidden.get(step.buffer_index), FILLING, step)
            self._want(self._shelves.get(step.batch), step.stage - 1, step)
            self._hidden[step.buffer_index] = cell
        else:
            self._look(step)
            self._computed.add(cell)
            self._results[step.batch] = step.stage
            for kind in range(len(LOADS)):
                if self._moves(kind, step.stage):
                    self._kept[kind, step.buffer_index] = ("whole", cell)

    def finish(self) -> None:
        """Check that all is computed and stored, and the next pass's first weights prefetched if planned."""
        shape = self._shape
        for stage in range(shape.num_stages):
            for batch in range(shape.num_batches):
                if (stage, batch) not in self._computed:
                    raise WentWrong(f"{stage}.{batch} was not computed")
                for kind, op in enumerate(STORES):
                    if self._moves(kind, stage) and (kind, (stage, batch)) not in self._stored:
                        raise WentWrong(f"no {op} of {stage}.{batch}")
        for stage in (0, 1):
            if shape.prefetch_next and shape.weights[stage]:
                ahead = shape.num_stages + stage
                if self._weights.get(buffer_of(shape, ahead)) != ahead:
                    raise WentWrong("the next pass's first weights are not there")

    def _look(self, step: Step) -> None:
        shape, cell = self._shape, (step.stage, step.batch)
        if step.op in STORES:
            place = STORES.index(step.op), step.buffer_index
            self._want(self._kept.get(place), ("whole", cell), step)
        elif step.op is Op.STORE_HIDDEN:
            self._want(self._results.get(step.batch), step.stage, step)
        elif step.op is Op.LOAD_HIDDEN:
            self._want(self._shelves.get(step.batch), step.stage - 1, step)
        elif step.op is Op.COMPUTE:
            if shape.weights[step.stage]:
                self._want(self._weights.get(buffer_of(shape, step.stage)), step.stage, step)
            for kind in range(len(LOADS)):
                if self._moves(kind, step.stage):
                    self._want(self._kept.get((kind, step.buffer_index)), ("past", cell), step)
            if step.stage and shape.hidden:
                self._want(self._hidden.get(step.buffer_index), cell, step)
            elif step.stage:
                self._want(self._results.get(step.batch), step.stage - 1, step)

    def _want(self, found: object, wanted: object, step: Step) -> None:
        if found != wanted:
            raise WentWrong(f"{step} found {found} instead of {wanted}")


def walk(steps: Sequence[Step], shape: PassShape, seed: int) -> None:
    """Simulate one random order of events that the streams and the ``after`` links allow.

    Streams get random weights, so that in some walks one stream is nearly always first or nearly always last.

    Raises:
        WentWrong: if a step does not find what it needs, or the streams wait for each other for ever.
    """
    chance = random.Random(seed)
    streams: dict[str, list[Step]] = {}
    for step in steps:
        streams.setdefault(step.stream, []).append(step)
    eagerness = {stream: chance.choice((0.02, 0.3, 1.0)) for stream in streams}
    running: list[Step] = []
    done: set[Key] = set()
    buffers = Buffers(shape)
    while True:
        ready = list(running)
        for stream, queue in streams.items():
            busy = sum(step.stream == stream for step in running)
            if queue and busy < AT_ONCE.get(stream, 1) and done.issuperset(queue[0].after):
                ready.append(queue[0])
        if not ready:
            break
        step = chance.choices(ready, [eagerness[step.stream] for step in ready])[0]
        if step in running:
            running.remove(step)
            buffers.end(step)
            done.add(step.key)
        else:
            running.append(streams[step.stream].pop(0))
            buffers.begin(step)
    if len(done) < len(steps):
        raise WentWrong("the streams wait for each other for ever")
    buffers.finish()
