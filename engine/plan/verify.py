"""Refuses a schedule that could go wrong in *any* timing of its streams.

Two steps are ordered only if a chain of stream order and ``after`` links leads from one to the other; the
stream that may have two steps under way orders none.
The rules below are stated independently of the generator: nothing is used before it is loaded,
nothing is overwritten while it is needed, nothing computed is lost, at most two stages' weights are
held.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from engine.errors import ScheduleError
from engine.plan.schedule import PREFETCHED, TWO_AT_ONCE, Key, Op, PassShape, Step
from engine.spec.layout import STAGE_BUFFERS, WEIGHT_SLOTS


def verify(steps: Sequence[Step], shape: PassShape) -> None:
    """Check one pass.

    Raises:
        ScheduleError: naming the first rule that is broken and the steps that break it.
    """
    order = _Order(steps)
    _every_cell_computed(order, shape)
    for step in steps:
        if step.op is Op.COMPUTE:
            _inputs_there(order, shape, step)
    _buffers_free(order, shape)
    for step in steps:
        if step.op is not Op.STORE_HIDDEN and step.buffer_index != order.buffer_of(step, shape):
            raise ScheduleError(f"step {step} uses another buffer than its computation")


class _Order:
    """Which steps always finish before others begin."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.by_key: dict[Key, int] = {}
        self.steps = steps
        self._before: list[int] = []  # bit sets of step indices
        last_on_stream: dict[str, int] = {}
        for index, step in enumerate(steps):
            if step.key in self.by_key:
                raise ScheduleError(f"step {step} is issued twice")
            before = 0
            for key in step.after:
                if key not in self.by_key:
                    raise ScheduleError(f"step {step} waits for {key}, which is not issued before it")
                before |= self._before[self.by_key[key]] | 1 << self.by_key[key]
            if step.stream in last_on_stream and step.stream != TWO_AT_ONCE:
                previous = last_on_stream[step.stream]
                before |= self._before[previous] | 1 << previous
            self._before.append(before)
            self.by_key[step.key] = last_on_stream[step.stream] = index

    def buffer_of(self, step: Step, shape: PassShape) -> int:
        """The buffer with which the computation of a step's cell works."""
        if step.op is Op.LOAD_WEIGHTS:
            return shape.buffer_of(step.stage)
        return self.steps[self.by_key[Op.COMPUTE, step.stage, step.batch]].buffer_index

    def require(self, first: Key, then: Key, rule: str) -> None:
        """Fail unless ``first`` always finishes before ``then`` begins."""
        for key in (first, then):
            if key not in self.by_key:
                raise ScheduleError(f"{rule}: {key} is missing")
        if not self._before[self.by_key[then]] >> self.by_key[first] & 1:
            raise ScheduleError(f"{rule}: {first} need not be finished before {then}")


def _every_cell_computed(order: _Order, shape: PassShape) -> None:
    for stage in range(shape.num_stages):
        for batch in range(shape.num_batches):
            key: Key = (Op.COMPUTE, stage, batch)
            if key not in order.by_key:
                raise ScheduleError(f"stage {stage} is never computed for batch {batch}")
            if stage:
                order.require((Op.COMPUTE, stage - 1, batch), key, "stages run in order")
            if shape.has_kv(stage):
                order.require(key, (Op.STORE_KV, stage, batch), "KV is stored once computed")
            if shape.has_state(stage):
                order.require(key, (Op.STORE_STATE, stage, batch), "state is stored once computed")
            if shape.hidden and stage < shape.num_stages - 1:
                stored: Key = (Op.STORE_HIDDEN, stage, batch)
                order.require(key, stored, "hidden states are stored")
                following: Key = (Op.LOAD_HIDDEN, stage + 1, batch)
                order.require(stored, following, "hidden states are stored before they are loaded")
    for stage in range(PREFETCHED if shape.prefetch_next else 0):
        ahead: Key = (Op.LOAD_WEIGHTS, shape.num_stages + stage, 0)
        if shape.weights[stage] and ahead not in order.by_key:
            raise ScheduleError(f"{ahead} is missing")


def _inputs_there(order: _Order, shape: PassShape, step: Step) -> None:
    stage, batch = step.stage, step.batch
    if shape.needs_weights(stage):
        order.require((Op.LOAD_WEIGHTS, stage, 0), step.key, "weights are loaded before use")
    if shape.has_kv(stage):
        order.require((Op.LOAD_KV, stage, batch), step.key, "KV is loaded before use")
    if shape.has_state(stage):
        order.require((Op.LOAD_STATE, stage, batch), step.key, "state is loaded before use")
    if shape.hidden and stage:
        order.require((Op.LOAD_HIDDEN, stage, batch), step.key, "hidden states are loaded before use")


def _buffers_free(order: _Order, shape: PassShape) -> None:
    """A buffer is filled again only after everything that read its last content has finished."""
    for op, readers in (
        (Op.LOAD_WEIGHTS, (Op.COMPUTE,)),
        (Op.LOAD_KV, (Op.COMPUTE, Op.STORE_KV)),
        (Op.LOAD_STATE, (Op.COMPUTE, Op.STORE_STATE)),
        (Op.LOAD_HIDDEN, (Op.COMPUTE,)),
    ):
        held: dict[int, Step] = {}
        buffers = STAGE_BUFFERS
        if op is Op.LOAD_WEIGHTS:
            buffers = WEIGHT_SLOTS
            for stage in range(PREFETCHED if shape.preloaded else 0):
                if shape.weights[stage]:
                    held[shape.buffer_of(stage)] = Step(op, stage, 0, shape.buffer_of(stage))
        for step in (step for step in order.steps if step.op is op):
            if not 0 <= step.buffer_index < buffers:
                raise ScheduleError(f"step {step} uses buffer {step.buffer_index}; there are {buffers}")
            old = held.get(step.buffer_index)
            if old is not None:
                batches = range(shape.num_batches) if op is Op.LOAD_WEIGHTS else (old.batch,)
                for reader, batch in itertools.product(readers, batches):
                    order.require((reader, old.stage, batch), step.key, "a buffer is refilled only when free")
            held[step.buffer_index] = step
