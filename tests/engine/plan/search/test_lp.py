"""The linear program against brute force, and rows that contradict each other."""

from __future__ import annotations

import itertools
import random

import pytest

from engine.plan.search.lp import Program, lowest, solve
from engine.plan.simulation.linear import KINDS, SHARES, LinearForm, Share
from engine.spec.hardware import Tier

STEPS = 3
THIRDS = [
    (a / STEPS, b / STEPS, (STEPS - a - b) / STEPS) for a in range(STEPS + 1) for b in range(STEPS + 1 - a)
]
"""Fractions of one kind on a grid."""


def form(draw: random.Random) -> LinearForm:
    return LinearForm(draw.uniform(0, 10), {share: draw.uniform(0, 10) for share in SHARES})


def grid() -> list[dict[Share, float]]:
    return [
        {Share(kind, tier): part for kind, parts in zip(KINDS, chosen, strict=True)
         for tier, part in zip(Tier, parts, strict=True)}
        for chosen in itertools.product(THIRDS, repeat=len(KINDS))
    ]  # fmt: skip


GRID = grid()


@pytest.mark.parametrize("seed", range(10))
def test_never_worse_than_any_grid_point(seed: int) -> None:
    draw = random.Random(seed)
    prefill, decode = ([form(draw) for _ in range(draw.randint(1, 3))] for _ in range(2))
    held, most = form(draw), draw.uniform(5, 30)
    program = Program([(prefill, 1.0), (decode, 7.0)], [("memory", held, most)])
    fitting = [
        max(row.at(point) for row in prefill) + 7 * max(row.at(point) for row in decode)
        for point in GRID
        if held.at(point) <= most
    ]
    found = solve(program)
    if found is None:
        assert not fitting and lowest(held) > most
        return
    assert held.at(found.fractions) <= most * (1 + 1e-6) + 1e-6
    for kind in KINDS:
        assert sum(found.fractions[Share(kind, tier)] for tier in Tier) == pytest.approx(1)
    assert found.seconds >= program.floor() * (1 - 1e-6) - 1e-6
    if fitting:
        assert found.seconds <= min(fitting) * (1 + 1e-4) + 1e-4


def test_a_solution_by_hand() -> None:
    slow = LinearForm.of("weights", {Tier.HOST: 1.0, Tier.DISK: 5.0})
    held = LinearForm.of("weights", {Tier.DEVICE: 10.0})
    host = LinearForm.of("weights", {Tier.HOST: 10.0})
    rows = [("device memory", held, 2.0), ("host memory", host, 5.0)]
    found = solve(Program([([slow], 1.0), ([slow], 1.0)], rows))
    assert found is not None
    weights = [found.fractions[Share("weights", tier)] for tier in Tier]
    assert weights == pytest.approx([0.2, 0.5, 0.3])
    assert found.seconds == pytest.approx(2 * (0.5 + 1.5))
    assert set(found.tight) == {"device memory", "host memory"}


def test_rows_that_contradict() -> None:
    form = LinearForm.of("weights", dict.fromkeys(Tier, 1.0))
    assert solve(Program([([form], 1)], [("disk", form, 0.5)])) is None
    assert Program([([form], 1)], [("disk", form, 0.5)]).too_large() == "disk"
    assert solve(Program([([form], 1)], most_seconds=0.5)) is None
    pinned = {Share("weights", Tier.DISK): 1.0}
    found = solve(Program([([form], 1)], pinned=pinned))
    assert found is not None and found.fractions[Share("weights", Tier.DISK)] == 1
