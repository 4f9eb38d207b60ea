"""From a model's name, a policy and a load to figures: engines made, run, and projected where that is asked.

It knows how engines are made and what a projection needs; how passes are timed is in
`harness.throughput.load`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from engine.engine import Engine
from engine.errors import UsageError
from engine.planner import own_profile
from engine.prediction import config_names, is_named, predict, shipped_model
from engine.profiler import check_machine
from engine.spec.policy import Policy
from engine.spec.profile import HardwareProfile
from engine.spec.request import CallProgress
from engine.spec.settings import EngineSettings
from harness.engines.auto import PROFILES
from harness.throughput.load import Load, MeasuredLoad, Times, deeper, measure, peaks_of

OnProgress = Callable[[CallProgress], None]


@dataclass(frozen=True)
class Projection:
    """How much is really run."""

    passes: int | None = None
    """Decode passes; None for all."""

    layers: int | None = None
    """Layers of the deeper one of two shortened models; None for the whole model."""

    @classmethod
    def parse(cls, text: str) -> Projection:
        """Read ``PASSES`` or ``LAYERS/PASSES``; raises ValueError if it is neither."""
        layers, slash, passes = text.rpartition("/")
        found = cls(int(passes), int(layers) if slash else None)
        if int(passes) < 2:
            raise ValueError("fewer than two passes tell nothing of the others")
        if slash and int(layers) < 2:
            raise ValueError("a projection over layers needs at least two of them")
        return found


@dataclass(frozen=True)
class Maker:
    """Makes engines that differ in policy and depth."""

    settings: EngineSettings
    on_notice: Callable[[str], None] | None = None

    @contextmanager
    def engine(self, policy: Policy, layers: int | None = None) -> Iterator[Engine]:
        """An engine, closed in the end.

        Args:
            layers: of a shortened model; only for those that ship as data.

        Raises:
            UsageError: for a model, device or folder that cannot be used.
        """
        model = self.settings.model
        if self._ships and not self._shipped and "/" not in model:
            raise UsageError(
                f"{model} ships as a config without weights: add --random-weights, or name a folder or "
                f"hub model that has them"
            )
        if layers is not None:
            self.check_shortening()
        place = shipped_model(model, layers) if self._shipped else nullcontext(model)
        with (
            place as folder,
            Engine(replace(self.settings, model=str(folder)), policy, self.on_notice) as engine,
        ):
            yield engine

    def check_shortening(self) -> None:
        """Raise UsageError if the model cannot be made with fewer layers."""
        if not self._shipped:
            raise UsageError(
                f"--project LAYERS/PASSES shortens a model that ships as data "
                f"({', '.join(config_names())}) and needs --random-weights"
            )

    @property
    def _ships(self) -> bool:
        return is_named(self.settings.model) and not Path(self.settings.model).is_dir()

    @property
    def _shipped(self) -> bool:
        """Whether the model is made from the config that ships, with random weights."""
        return self._ships and self.settings.weights == "random"


def run(
    maker: Maker,
    policy: Policy,
    load: Load,
    profile: HardwareProfile | None,
    projection: Projection | None = None,
    repeats: int = 1,
    on_progress: OnProgress = lambda progress: None,
) -> list[MeasuredLoad]:
    """Measure a load ``repeats`` times, or project it."""
    projection = projection or Projection()
    if projection.layers is None:
        with maker.engine(policy) as engine:
            return [measure(engine, load, profile, projection.passes, on_progress) for _ in range(repeats)]
    maker.check_shortening()
    with maker.engine(policy) as whole:
        layers, requests = whole.spec.num_layers, load.prompts(whole.spec.vocab_size)
        planned = whole.check(requests)
        predicted = Times.predicted(predict(whole, requests, profile)) if profile else None
    depths = projection.layers // 2, projection.layers
    if projection.layers >= layers:
        raise UsageError(f"--project {projection.layers} layers is no fewer than the model's {layers}")
    found: list[list[MeasuredLoad]] = []
    for depth in depths:
        with maker.engine(policy, depth) as engine:
            found.append(
                [measure(engine, load, None, projection.passes, on_progress) for _ in range(repeats)]
            )
    peaks = peaks_of(planned, None)
    return [
        replace(
            deep, times=deeper(shallow.times, deep.times, depths, layers), predicted=predicted, peaks=peaks
        )
        for shallow, deep in zip(*found, strict=True)
    ]


def find_own_profile(device: str, path: Path | None = None) -> HardwareProfile | None:
    """This machine's profile: a file, or what ``run_helm.py profile`` left; None where there is none.

    Raises:
        ProfileError: if a file that is named cannot be used, or is of another machine.
    """
    if path is None:
        return own_profile(PROFILES, device)
    profile = HardwareProfile.load(path)
    check_machine(profile, device)
    return profile
