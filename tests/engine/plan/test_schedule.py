"""Schedules are correct under any timing, and the verifier refuses those that are not."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from engine.errors import ScheduleError
from engine.plan.schedule import STREAMS, Key, Op, PassShape, Step, schedule
from engine.plan.verify import verify
from tests.support.engine_interleavings import WentWrong, walk

STATE = (False, True, False, True, False)
FULL = PassShape(5, 3, (True,) * 5, kv=True, hidden=True, prefetch_next=True, state=STATE)
"""A pass with every kind of step."""


def shapes() -> Iterator[PassShape]:
    """Passes over 3 to 6 stages and 1 to 4 batches with every combination of transfers."""
    for stages, batches in itertools.product((3, 4, 6), (1, 2, 4)):
        for weights in ((True,) * stages, (False,) * stages, (False,) + (True,) * (stages - 1)):
            for kv, hidden, buffer_index, ahead, following in itertools.product((False, True), repeat=5):
                yield PassShape(stages, batches, weights, kv, hidden, int(buffer_index), ahead, following)
            state = (False, *[True] * (stages - 2), False)
            for kv, hidden in itertools.product((False, True), repeat=2):
                yield PassShape(stages, batches, weights, kv, hidden, state=state)


def refused(steps: Sequence[Step], shape: PassShape) -> bool:
    try:
        verify(steps, shape)
    except ScheduleError as error:
        assert "\n" not in str(error)
        return True
    return False


def goes_wrong(steps: Sequence[Step], shape: PassShape, walks: int = 12) -> bool:
    """Whether under any of many timings a step uses something that is not there."""
    for seed in range(walks):
        try:
            walk(steps, shape, seed)
        except WentWrong:
            return True
    return False


def test_generated_schedules_are_accepted_and_walk_well() -> None:
    count = 0
    for shape in shapes():
        for lookahead in (0, 1) if not shape.prefetch_next else (1,):
            steps = list(schedule(shape, lookahead))
            verify(steps, shape)
            for seed in range(2):
                walk(steps, shape, seed)
            count += 1
    assert count > 400


def test_both_schedules_have_the_same_cells() -> None:
    for shape in shapes():
        if shape.prefetch_next:
            continue
        orders = [list(schedule(shape, lookahead)) for lookahead in (0, 1)]
        keys = [sorted(step.key for step in steps) for steps in orders]
        assert keys[0] == keys[1]
        cells = [[(s.stage, s.batch) for s in steps if s.op is Op.COMPUTE] for steps in orders]
        assert (
            cells[0] == cells[1] == list(itertools.product(range(shape.num_stages), range(shape.num_batches)))
        )


def test_sequential_computes_each_cell_right_after_its_loads() -> None:
    steps = list(schedule(dataclasses.replace(FULL, prefetch_next=False), lookahead=0))
    for step, following in itertools.pairwise(steps):
        if step.op in (Op.LOAD_KV, Op.LOAD_STATE, Op.LOAD_HIDDEN):
            assert (following.stage, following.batch) == (step.stage, step.batch)


def test_overlapped_loads_the_next_stage_while_one_computes() -> None:
    keys = [step.key for step in schedule(FULL, lookahead=1)]
    for stage in range(FULL.num_stages - 1):
        assert keys.index((Op.LOAD_WEIGHTS, stage + 1, 0)) < keys.index((Op.COMPUTE, stage, 0))
    head = keys.index((Op.COMPUTE, FULL.num_stages - 1, 0))
    for ahead in (0, 1):
        assert keys.index((Op.LOAD_WEIGHTS, FULL.num_stages + ahead, 0)) < head, (
            "the next pass's first weights"
        )


def test_every_dropped_step_is_caught() -> None:
    dropped = 0
    for shape in shapes():
        if shape.num_stages == 6 or shape.num_batches == 4:
            continue
        steps = list(schedule(shape))
        for index in range(len(steps)):
            assert refused(steps[:index] + steps[index + 1 :], shape), f"without {steps[index]}"
            dropped += 1
    assert dropped > 2000


def ordered(steps: Sequence[Step]) -> set[tuple[int, int]]:
    """Pairs (first, then) of step indices that streams and links order: the transitive closure."""
    place = {step.key: index for index, step in enumerate(steps)}
    before: list[set[int]] = []
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        direct = [place[key] for key in step.after]
        if step.stream in last and step.stream != "weights":  # two of which may run at once
            direct.append(last[step.stream])
        before.append(set(direct).union(*(before[other] for other in direct)) if direct else set())
        last[step.stream] = index
    return {(first, then) for then, firsts in enumerate(before) for first in firsts}


def was_empty(step: Step, before: Key, shape: PassShape) -> bool:
    """Whether the buffer that a load fills held nothing that the computation ``before`` could have used."""
    op, stage, _ = before
    used = {
        Op.LOAD_WEIGHTS: shape.weights[stage % shape.num_stages],
        Op.LOAD_KV: shape.has_kv(stage),
        Op.LOAD_STATE: shape.has_state(stage),
        Op.LOAD_HIDDEN: stage > 0,
    }
    return op is Op.COMPUTE and not used.get(step.op, True)


def without_link(steps: Sequence[Step], index: int, link: int) -> list[Step]:
    step = steps[index]
    after = step.after[:link] + step.after[link + 1 :]
    return [*steps[:index], dataclasses.replace(step, after=after), *steps[index + 1 :]]


@pytest.mark.parametrize("shape", [
    FULL,
    PassShape(4, 1, (True,) * 4, kv=True, hidden=True),
    PassShape(4, 2, (True,) * 4, kv=False, hidden=False),
    PassShape(4, 2, (False,) * 4, kv=True, hidden=False),
    PassShape(4, 2, (False,) * 4, kv=False, hidden=True),
    PassShape(5, 2, (False,) * 5, kv=False, hidden=False, state=STATE),
    PassShape(5, 1, (True,) * 5, kv=True, hidden=True, state=STATE),
    PassShape(5, 2, (False, True, True, True, True), kv=True, hidden=True, first_buffer=1),
    PassShape(4, 3, (True,) * 4, kv=False, hidden=True, preloaded=True, prefetch_next=True),
])  # fmt: skip
def test_every_dropped_link_that_matters_is_caught(shape: PassShape) -> None:
    """A link matters unless streams and other links give the same order, or the buffer was empty before."""
    steps = list(schedule(shape))
    whole, matter = ordered(steps), 0
    for index, step in enumerate(steps):
        for link, waited_for in enumerate(step.after):
            mutant = without_link(steps, index, link)
            if ordered(mutant) == whole or was_empty(step, waited_for, shape):
                assert not refused(mutant, shape), "what cannot go wrong is no error"
            else:
                matter += 1
                assert refused(mutant, shape), f"{step} without {step.after[link]}"
    assert matter >= 4


def mutants(steps: Sequence[Step], chance: random.Random) -> Iterator[tuple[str, list[Step]]]:
    """Changed schedules, most of which are wrong."""
    for index, step in enumerate(steps):
        rest = [*steps[:index], *steps[index + 1 :]]
        yield (
            f"{step} other buffer",
            [
                *steps[:index],
                dataclasses.replace(step, buffer_index=1 - step.buffer_index),
                *steps[index + 1 :],
            ],
        )
        for target in {chance.randrange(len(steps)), max(index - 1, 0), min(index + 1, len(rest)), len(rest)}:
            if target != index:
                yield f"{step} moved to {target}", [*rest[:target], step, *rest[target:]]
        for link in range(len(step.after)):
            yield f"{step} without {step.after[link]}", without_link(steps, index, link)


@pytest.mark.parametrize("shape", [
    FULL,
    PassShape(4, 2, (True,) * 4, kv=True, hidden=True, first_buffer=1),
    PassShape(4, 2, (True,) * 4, kv=True, hidden=False, preloaded=True, prefetch_next=True),
    PassShape(3, 3, (False, True, True), kv=False, hidden=True),
    PassShape(4, 1, (True,) * 4, kv=True, hidden=True),
    PassShape(5, 2, (True,) * 5, kv=False, hidden=False, state=STATE),
])  # fmt: skip
def test_what_the_verifier_accepts_goes_well_in_every_timing(shape: PassShape) -> None:
    chance = random.Random(0)
    accepted = wrong = 0
    for lookahead in (0, 1) if not shape.prefetch_next else (1,):
        for what, steps in mutants(list(schedule(shape, lookahead)), chance):
            if refused(steps, shape):
                wrong += 1
            else:
                accepted += 1
                assert not goes_wrong(steps, shape), what
    assert wrong > accepted, "most mutations are errors"


def test_late_load_duplicate_and_wrong_buffer_are_named() -> None:
    steps = list(schedule(FULL))
    keys = [step.key for step in steps]
    late = keys.index((Op.LOAD_WEIGHTS, 2, 0))
    delayed = [*steps[:late], *steps[late + 1 :], steps[late]]
    with pytest.raises(ScheduleError, match=r"not issued before it|need not be finished|missing"):
        verify(delayed, FULL)
    with pytest.raises(ScheduleError, match="issued twice"):
        verify([*steps, steps[3]], FULL)
    load = steps[keys.index((Op.LOAD_KV, 2, 1))]
    swapped = [
        dataclasses.replace(step, buffer_index=1 - step.buffer_index) if step is load else step
        for step in steps
    ]
    with pytest.raises(ScheduleError, match="buffer"):
        verify(swapped, FULL)
    third = [dataclasses.replace(step, buffer_index=2) if step is load else step for step in steps]
    with pytest.raises(ScheduleError, match="there are 2"):
        verify(third, FULL)


def test_steps_print_as_one_line() -> None:
    lines = [str(step) for step in schedule(FULL)]
    assert all("\n" not in line for line in lines)
    assert any("load weights 3.0" in line and "after compute 1.2" in line for line in lines)
    assert {step.stream for step in schedule(FULL)} == set(STREAMS.values())
