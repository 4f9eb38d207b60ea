"""``--policy auto``: an engine whose policy is found by the planner when its requests are known.

It stands where an engine stands; every door that makes an engine can be given it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine.errors import BudgetError, PolicyError
from engine.spec.fields import read_fields
from engine.spec.format_key import format_key
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord, PredictionRecord
from engine.spec.request import Output, Progress, Request
from engine.spec.settings import EngineSettings
from engine.units import format_rate, format_seconds
from harness.engines.protocol import EngineLike

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.spec.profile import HardwareProfile

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
    """Whether a policy is still to be found; its formats are what it shall have."""
    return policy.name.partition(",")[0] == AUTO


class AutoEngine:
    """An engine with a policy of its own finding.

    Attributes:
        policy: the one that was found; before, only its name and formats mean something.
        predicted: what it was predicted to do; None before.
    """

    def __init__(
        self,
        make: Callable[[Policy], EngineLike],
        policy: Policy,
        settings: EngineSettings,
        *,
        say: Callable[[str], None],
        first: EngineLike,
        profiles: Path = PROFILES,
    ) -> None:
        """Nothing is planned yet.

        Args:
            make: makes the engine of a policy.
            first: one of ``policy``, which knows the model; it is closed when the policy is found.
            profiles: folder of measured profiles.
        """
        self._make, self._settings, self._say = make, settings, say
        self._profiles = profiles
        self.policy = policy
        self.predicted: PredictionRecord | None = None
        self._engine = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def settle(self, requests: Sequence[Request], before: EngineRecord | None = None) -> Policy:
        """Find the policy for these requests, unless one is found that can answer them; returns it.

        Args:
            before: the record of an earlier session, whose policy is taken again if it still fits: its
                answers are kept.

        Raises:
            InfeasibleError: if none fits, naming the constraint that leaves none.
        """
        if self.predicted is not None:
            try:
                self._engine.check(requests)
                return self.policy
            except BudgetError:
                self._say("the policy that was found does not hold these requests: planning anew")
        elif before and self._take_again(requests, before):
            return self.policy
        from engine.planner import plan_for

        profile = self._profile()
        found = plan_for(cast("Engine", self._engine), requests, profile, self._settings.budgets, self.policy)
        chosen = found.best.policy.replace(name=self.policy.name)
        self._use(chosen)
        self.predicted = read_fields(PredictionRecord, found.to_dict()["best"] | {"profile": profile.name})
        guess = found.best.estimate
        self._say(
            f"policy {AUTO}: {found.best.policy.name}: predicted {format_rate(guess.throughput, 'token')} "
            f"generated, {format_seconds(guess.seconds)} for {len(requests):,} requests"
        )
        return self.policy

    def _take_again(self, requests: Sequence[Request], before: EngineRecord) -> bool:
        """Use an earlier session's policy, if it is one that was found, of the same formats, and fits."""
        predicted = before.predicted
        if predicted is None:
            return False
        earlier = Policy.from_mapping({**predicted.policy, "name": self.policy.name})
        if format_key(earlier) != format_key(self.policy):
            return False
        engine = self._make(earlier)
        try:
            engine.check(requests)
        except BudgetError:
            engine.close()
            return False
        self._engine.close()
        self._engine, self.policy, self.predicted = engine, earlier, predicted
        self._say(f"policy {AUTO}: {predicted.policy['name']}, as in the session before")
        return True

    def _use(self, policy: Policy) -> None:
        engine = self._make(policy)
        self._engine.close()
        self._engine, self.policy = engine, policy

    @property
    def engine(self) -> EngineLike:
        """The one that answers."""
        return self._engine

    def check(self, requests: Sequence[Request]) -> Any:
        """See `engine.engine.Engine.check`."""
        self.settle(requests)
        return self._engine.check(requests)

    def answer(
        self,
        requests: Sequence[Request],
        on_output: Callable[[int, Output], None] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        **others: Any,
    ) -> list[Output]:
        """See `engine.engine.Engine.answer`."""
        if requests:
            self.settle(requests)
        return self._engine.answer(requests, on_output=on_output, on_progress=on_progress, **others)

    def record(self) -> EngineRecord:
        """The engine's record, with the prediction beside what was measured."""
        return replace(self._engine.record(), predicted=self.predicted)

    def close(self) -> None:
        """See `engine.engine.Engine.close`."""
        self._engine.close()

    def _profile(self) -> HardwareProfile:
        """This machine's profile; it is measured where there is none."""
        from engine.planner import own_profile

        profile = own_profile(self._profiles, self._settings.device)
        if profile is None:
            from engine.profiler import measure_profile

            self._say(f"{self._profiles} holds no profile of this machine: measuring it, about two minutes")
            profile = measure_profile(self._settings.device, self._settings.offload_dir)
            profile.save(self._profiles / f"{profile.name}.json")
        return profile


def predicted_table(records: Mapping[str, EngineRecord]) -> str:
    """What was predicted beside what was measured, of those engines' records that hold a prediction.

    The prediction counts every answer as long as it may be; answers that end sooner take less.
    """
    lines = []
    for name, record in records.items():
        if predicted := record.predicted:
            guess, totals = predicted.predicted, record.totals
            lines.append(
                f"| {name} | {predicted.policy['name']} | {predicted.profile} | "
                f"{guess['seconds']:.2f} s, {guess['passes']:,} passes | "
                f"{totals.seconds:.2f} s, {totals.passes:,} passes |"
            )
    if not lines:
        return ""
    head = "| policy | found by the planner | profile | predicted at most | measured |"
    return "\n".join(["", head, "| --- | --- | --- | --- | --- |", *lines, ""])
