"""The linear program over a placement's fractions (FlexGen paper, section 4.3), solved with PuLP.

Its rows are the forms of `engine.plan.simulation.cost` and of the engine's own memory plan; nothing is
counted here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from engine.errors import InfeasibleError, first_line
from engine.plan.simulation.linear import KINDS, SHARES, LinearForm, Share
from engine.spec.hardware import Tier

_TIE = 1e-5
_FAR = {Tier.DEVICE: 0, Tier.HOST: 1, Tier.DISK: 2}
"""Of equally fast fractions those are taken that keep the most near: distance costs `_TIE` of the time."""


@dataclass(frozen=True)
class Program:
    """Minimise the sum over kinds of passes of ``count x longest(forms)``."""

    passes: Sequence[tuple[Sequence[LinearForm], float]]
    """Of each kind of pass (with prompts, decoding) what it takes at least on every resource or chain of
    them, in seconds, and how many such passes there are."""

    memory: Sequence[tuple[str, LinearForm, float]] = ()
    """(name, bytes, most bytes)."""

    most_seconds: float | None = None
    """Of the whole."""

    pinned: Mapping[Share, float] = field(default_factory=dict)

    def floor(self) -> float:
        """Seconds below which no fractions get, whatever memory there is."""
        return sum(count * max(map(lowest, forms), default=0.0) for forms, count in self.passes)

    def too_large(self) -> str | None:
        """The first row of memory that no fractions meet, even alone; None if there is none."""
        return next((name for name, form, most in self.memory if lowest(form) > most), None)


@dataclass(frozen=True)
class Solution:
    """The best fractions."""

    seconds: float
    fractions: Mapping[Share, float]

    tight: tuple[str, ...]
    """Rows of memory that leave nothing over."""


def solve(program: Program) -> Solution | None:
    """The optimum, or None where the rows contradict each other.

    Raises:
        InfeasibleError: if the solver fails.
    """
    import pulp

    problem = pulp.LpProblem("policy", pulp.LpMinimize)
    shares: dict[Share, Any] = {
        share: pulp.LpVariable(f"{share.kind}_{share.tier.value}", 0, 1) for share in SHARES
    }
    longest = [pulp.LpVariable(f"pass_{kind}", 0) for kind in range(len(program.passes))]
    seconds = pulp.lpSum(count * each for each, (_, count) in zip(longest, program.passes, strict=True))
    preferred = _TIE * max(program.floor(), 1e-9)
    distance = pulp.lpSum(_FAR[tier] * shares[Share(kind, tier)] for kind in KINDS for tier in Tier)
    problem += seconds + preferred * distance
    for kind in KINDS:
        problem += pulp.lpSum(shares[Share(kind, tier)] for tier in Tier) == 1
    for share, value in program.pinned.items():
        problem += shares[share] == value

    def row(form: LinearForm, scale: float = 1.0) -> Any:
        terms = (scale * value * shares[share] for share, value in form.coefficients.items())
        return pulp.lpSum(terms) + scale * form.constant

    for each, (forms, _) in zip(longest, program.passes, strict=True):
        for form in forms:
            problem += each >= row(form)
    for name, form, most in program.memory:
        scale = 1 / most if most > 0 else 2.0**-30
        problem += row(form, scale) <= most * scale, name.replace(" ", "_")
    if program.most_seconds is not None:
        problem += seconds <= program.most_seconds
    try:
        problem.solve(_solver())
    except pulp.PulpError as error:
        what = f"the solver cannot handle the figures of profile and budgets ({first_line(error)})"
        raise InfeasibleError("figures", f"{what}: check the profile, or measure again") from error
    if pulp.LpStatus[problem.status] != "Optimal":
        return None
    fractions = {share: min(1.0, max(0.0, variable.value())) for share, variable in shares.items()}
    tight = tuple(
        name for name, form, most in program.memory if form.at(fractions) >= most * (1 - 1e-6) and most > 0
    )
    return Solution(float(seconds.value() or 0.0), fractions, tight)


def lowest(form: LinearForm) -> float:
    """The least value of a form over all fractions, each kind's summing to 1."""
    value = form.constant
    for kind in KINDS:
        value += min(form.coefficients.get(Share(kind, tier), 0.0) for tier in Tier)
    return value


@cache
def _solver() -> Any:
    """HiGHS where it is installed, which solves within this process, else CBC."""
    import pulp

    highs = pulp.HiGHS(msg=False)
    return highs if highs.available() else pulp.PULP_CBC_CMD(msg=False)
