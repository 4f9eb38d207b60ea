"""The linear program over the nine fractions (FlexGen paper, section 4.3), solved with PuLP.

Its rows are the forms of `engine.plan.simulation.cost` and of the engine's own memory plan; nothing is
counted here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from engine.plan.simulation.linear import KINDS, SHARES, LinearForm, Share
from engine.spec.hardware import Tier

_TIE = 1e-5
_FAR = {Tier.DEVICE: 0, Tier.HOST: 1, Tier.DISK: 2}
"""Of equally fast fractions those are taken that keep the most near: distance costs `_TIE` of the time."""


@dataclass(frozen=True)
class Program:
    """Minimise ``prefills x longest(prefill) + decodes x longest(decode)``."""

    prefill: Sequence[LinearForm]
    """What a pass with prompts takes at least, on every resource or chain of them, seconds."""

    decode: Sequence[LinearForm]
    prefills: float
    decodes: float
    memory: Sequence[tuple[str, LinearForm, float]] = ()
    """(name, bytes, most bytes)."""

    most_seconds: float | None = None
    """Of the whole."""

    pinned: Mapping[Share, float] = field(default_factory=dict)

    def floor(self) -> float:
        """Seconds below which no fractions get, whatever memory there is."""
        return self.prefills * _longest(self.prefill) + self.decodes * _longest(self.decode)

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
    """The optimum, or None where the rows contradict each other."""
    import pulp

    problem = pulp.LpProblem("policy", pulp.LpMinimize)
    shares: dict[Share, Any] = {
        share: pulp.LpVariable(f"{share.kind}_{share.tier.value}", 0, 1) for share in SHARES
    }
    prefill, decode = (pulp.LpVariable(name, 0) for name in ("prefill", "decode"))
    preferred = _TIE * max(program.floor(), 1e-9)
    distance = pulp.lpSum(_FAR[tier] * shares[Share(kind, tier)] for kind in KINDS for tier in Tier)
    problem += program.prefills * prefill + program.decodes * decode + preferred * distance
    for kind in KINDS:
        problem += pulp.lpSum(shares[Share(kind, tier)] for tier in Tier) == 1
    for share, value in program.pinned.items():
        problem += shares[share] == value

    def row(form: LinearForm, scale: float = 1.0) -> Any:
        terms = (scale * value * shares[share] for share, value in form.coefficients.items())
        return pulp.lpSum(terms) + scale * form.constant

    for longest, forms in ((prefill, program.prefill), (decode, program.decode)):
        for form in forms:
            problem += longest >= row(form)
    for name, form, most in program.memory:
        scale = 1 / most if most > 0 else 2.0**-30
        problem += row(form, scale) <= most * scale, name.replace(" ", "_")
    if program.most_seconds is not None:
        problem += program.prefills * prefill + program.decodes * decode <= program.most_seconds
    problem.solve(_solver())
    if pulp.LpStatus[problem.status] != "Optimal":
        return None
    fractions = {share: min(1.0, max(0.0, variable.value())) for share, variable in shares.items()}
    tight = tuple(
        name for name, form, most in program.memory if form.at(fractions) >= most * (1 - 1e-6) and most > 0
    )
    seconds = program.prefills * (prefill.value() or 0.0) + program.decodes * (decode.value() or 0.0)
    return Solution(float(seconds), fractions, tight)


def lowest(form: LinearForm) -> float:
    """The least value of a form over all fractions, each kind's summing to 1."""
    value = form.constant
    for kind in KINDS:
        value += min(form.coefficients.get(Share(kind, tier), 0.0) for tier in Tier)
    return value


def _longest(forms: Sequence[LinearForm]) -> float:
    return max((lowest(form) for form in forms), default=0.0)


@cache
def _solver() -> Any:
    """HiGHS where it is installed, which solves within this process, else CBC."""
    import pulp

    highs = pulp.HiGHS(msg=False)
    return highs if highs.available() else pulp.PULP_CBC_CMD(msg=False)
