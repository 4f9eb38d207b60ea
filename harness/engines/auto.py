"""``--policy auto``: the policy that the planner finds for requests that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import BudgetError, PolicyError
from engine.spec.policy import Policy
from engine.units import format_rate, format_seconds
from harness.text_table import markdown_table

if TYPE_CHECKING:  # commands read only names here, and are to start quickly
    from engine.spec.memory_plan import MemoryPlan
    from engine.spec.model import ModelSpec
    from engine.spec.profile import HardwareProfile
    from engine.spec.record import EngineRecord, PredictionRecord
    from engine.spec.request import CallProgress, Output, Request
    from engine.spec.settings import EngineSettings
    from harness.engines.protocol import OnNotice, TraceLike

AUTO = "auto"
PROFILES = Path("results/profiles")


def with_auto(known: Mapping[str, Policy]) -> dict[str, Policy]:
    """The named policies, and the word for the one that is found.

    Raises:
        PolicyError: if the word is taken.
    """
    if AUTO in known:
        raise PolicyError(f"a policy file names a policy {AUTO}, which is the planner's word: rename it")
    return {**known, AUTO: Policy(name=AUTO)}


def is_auto(policy: Policy) -> bool:
    """Whether the planner is to find a policy; the formats given with it are kept."""
    return policy.name.partition(",")[0] == AUTO


@dataclass(frozen=True)
class FoundPolicy:
    """The planner's policy for some requests."""

    policy: Policy
    predicted: PredictionRecord
    """What it is predicted to do."""


def resolve_policy(
    settings: EngineSettings,
    policy: Policy,
    requests: Sequence[Request],
    say: OnNotice,
    before: EngineRecord | None = None,
    profiles: Path = PROFILES,
) -> FoundPolicy:
    """Find the fastest policy for requests within the budgets.

    Args:
        policy: its name and formats are kept.
        say: called with what was found, and before a profile is measured.
        before: the record of an earlier session, whose policy is taken again if it still fits: its answers
            are kept.
        profiles: folder of measured profiles.

    Raises:
        InfeasibleError: if none fits, naming the constraint that leaves none.
    """
    from engine.engine import Engine
    from engine.planner import plan_for
    from engine.spec.fields import read_fields
    from engine.spec.record import PredictionRecord

    if before and (earlier := _earlier(settings, policy, requests, before)):
        say(f"policy {AUTO}: {earlier.predicted.policy['name']}, as in the session before")
        return earlier
    profile = _profile(settings, say, profiles)
    with Engine(settings, policy, say) as engine:  # for its model and what is free; it loads nothing
        plan = plan_for(engine, requests, profile, settings.budgets, policy)
    estimate = plan.best.estimate
    say(
        f"policy {AUTO}: {plan.best.policy.name}: predicted {format_rate(estimate.throughput, 'token')} "
        f"generated, {format_seconds(estimate.seconds)} for {len(requests):,} requests"
    )
    predicted = read_fields(PredictionRecord, plan.to_dict()["best"] | {"profile": profile.name})
    return FoundPolicy(plan.best.policy.replace(name=policy.name), predicted)


def _earlier(
    settings: EngineSettings, policy: Policy, requests: Sequence[Request], before: EngineRecord
) -> FoundPolicy | None:
    """An earlier session's policy, if it is one that was found, of the same formats, and fits."""
    from engine.engine import Engine
    from engine.spec.format_key import format_key

    predicted = before.predicted
    if predicted is None:
        return None
    found = Policy.from_mapping({**predicted.policy, "name": policy.name})
    if format_key(found) != format_key(policy):
        return None
    with Engine(settings, found) as engine:
        try:
            engine.check(requests)
        except BudgetError:
            return None
    return FoundPolicy(found, predicted)


def _profile(settings: EngineSettings, say: OnNotice, folder: Path) -> HardwareProfile:
    """This machine's profile; it is measured where there is none."""
    from engine.planner import own_profile

    profile = own_profile(folder, settings.device)
    if profile is None:
        from engine.profiler import measure_profile

        say(f"{folder} holds no profile of this machine: measuring it, about two minutes")
        profile = measure_profile(settings.device, settings.offload_dir)
        profile.save(folder / f"{profile.name}.json")
    return profile


class PlannedEngine:
    """An engine for requests that are not known when it is made: its policy is found for the first of them.

    Where later ones do not fit that policy, it is found again.
    """

    def __init__(
        self, settings: EngineSettings, policy: Policy, say: OnNotice, profiles: Path = PROFILES
    ) -> None:
        """Nothing is planned yet; see `resolve_policy`."""
        from engine.engine import Engine

        self._settings, self._policy, self._say, self._profiles = settings, policy, say, profiles
        self._engine = Engine(settings, policy, say)
        self._predicted: PredictionRecord | None = None

    @property
    def spec(self) -> ModelSpec:
        """The model as data."""
        return self._engine.spec

    @property
    def trace(self) -> TraceLike:
        """What every stream did since the policy was found."""
        return self._engine.trace

    def check(self, requests: Sequence[Request]) -> MemoryPlan:
        """See `engine.engine.Engine.check`."""
        self._find_policy(requests)
        return self._engine.check(requests)

    def answer(
        self,
        requests: Sequence[Request],
        *,
        on_output: Callable[[int, Output], None] | None = None,
        on_progress: Callable[[CallProgress], None] | None = None,
    ) -> list[Output]:
        """See `engine.engine.Engine.answer`."""
        if requests:
            self._find_policy(requests)
        return self._engine.answer(requests, on_output=on_output, on_progress=on_progress)

    def record(self) -> EngineRecord:
        """The engine's record, with the prediction beside what was measured."""
        return replace(self._engine.record(), predicted=self._predicted)

    def close(self) -> None:
        """See `engine.engine.Engine.close`."""
        self._engine.close()

    def _find_policy(self, requests: Sequence[Request]) -> None:
        if self._predicted is not None:
            try:
                self._engine.check(requests)
                return
            except BudgetError:
                self._say("the policy that was found does not hold these requests: planning anew")
        from engine.engine import Engine

        found = resolve_policy(self._settings, self._policy, requests, self._say, profiles=self._profiles)
        self._engine.close()
        self._engine = Engine(self._settings, found.policy, self._say)
        self._predicted = found.predicted


def predicted_table(records: Mapping[str, EngineRecord]) -> str:
    """What was predicted beside what was measured, of those engines' records that hold a prediction.

    The prediction counts every answer as long as it may be; answers that end sooner take less.
    """
    rows = [("policy", "found by the planner", "profile", "predicted at most", "measured")]
    for name, record in records.items():
        if predicted := record.predicted:
            guess, totals = predicted.predicted, record.totals
            rows.append((
                name,
                predicted.policy["name"],
                predicted.profile,
                f"{guess['seconds']:.2f} s, {guess['passes']:,} passes",
                f"{totals.seconds:.2f} s, {totals.passes:,} passes",
            ))  # fmt: skip
    return "\n".join(["", *markdown_table(rows, left=5), ""]) if rows[1:] else ""
