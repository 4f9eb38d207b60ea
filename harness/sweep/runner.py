"""Sweeps formats over what a model is asked, and writes the curve of accuracy against compression.

It knows the order of the steps; each is another module's work. First the reference, which compresses
nothing: its HELM runs give the questions whose answers' likelihoods are measured, its logits go to a file.
Then format by format the same, each kept as soon as it is done. Speed comes last, in rounds over all formats,
so that what a column compares was measured under the same conditions. At the end the gate and the table.

    <output>/curves/<suite>/points/<format>.json     measurements of one format
    <output>/curves/<suite>/curve.md, .csv, .json    the table
    <output>/curves/<suite>/helm/runs/<format>/      HELM's own files, journal and table of one format
    <output>/curves/<suite>/reference-*.npy          logits of full precision, while the sweep runs
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.errors import TierbenchError, UsageError, storage_errors
from engine.files.names import check_folder_name
from engine.files.whole import write_whole
from engine.spec.format_key import reference_of
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.request import Request
from engine.units import format_seconds
from harness.engines.protocol import SweepEngine, SweepEngineFactory
from harness.environment import check_torchvision, require_helm, require_memory_for
from harness.files import digest_of, write_json
from harness.helm.registry import slug
from harness.identity import calibration_digest, identity_of, in_words
from harness.progress.line import Progress
from harness.suite.manifest import kept_date
from harness.sweep import items as curve_items
from harness.sweep import table as curve_table
from harness.sweep import texts as curve_text
from harness.sweep.accuracy import Accuracy, run_entries
from harness.sweep.items import Item
from harness.sweep.measure import (
    Likelihoods,
    compare,
    measure_rate,
    measure_storage,
    record_reference,
    speed_requests,
    window_of,
)
from harness.sweep.options import CurveOptions
from harness.sweep.points import Divergence, Point, Speed, read_point, write_point
from harness.sweep.rows import make_rows
from harness.tokenizer import Text

_DEMO_WINDOW = 256
"""Of the demo's text: memos of about a hundred tokens, of which half a window of context holds one."""


@dataclass(frozen=True)
class CurveResult:
    """What a sweep leaves behind."""

    folder: Path
    shown: str
    """The table, as it is printed."""

    failures: Sequence[str] = ()
    """One line per format that could not be measured."""


def run_curve(options: CurveOptions, engine_factory: SweepEngineFactory | None = None) -> CurveResult:
    """Measure full precision and every format; a sweep that was killed continues.

    Args:
        engine_factory: makes the engines; None takes `engine.engine.Engine`.

    Raises:
        TierbenchError: for every error that a user can cause, except in a single format, which is reported
            with the result.
    """
    check_folder_name("suite", options.suite)
    require_memory_for("torch")
    check_torchvision()
    if options.run_entries or options.conf_paths:
        require_helm()
    if engine_factory is None:
        from engine.engine import Engine

        engine_factory = Engine
    return _Curve(options, engine_factory).run()


class _Curve:
    """The steps of `run_curve`, and what they hand to each other."""

    items: list[Item]
    speed_requests: list[Request]
    limits: dict[Tier, int]
    asked: dict[str, Any]
    logits: Path

    def __init__(self, options: CurveOptions, factory: SweepEngineFactory) -> None:
        self.options, self._factory, self.progress = options, factory, Progress()
        with storage_errors(options.folder):
            (options.folder / "points").mkdir(parents=True, exist_ok=True)
        self._running_text, self._passages = self._read_texts()
        self.text = Text.load(options.settings.model, options.settings.trust_remote_code)
        if self.text.shown_date:  # one day for all formats, however long the sweep takes
            kept = kept_date(options.folder.glob("helm/runs/*/policies/*/manifest.json"))
            self.text.today = kept or self.text.today
        self.chat = self.text.uses_chat(options.chat)
        self._spent: list[float] = []  # seconds of the formats measured now

    def run(self) -> CurveResult:
        options = self.options
        points = [self._reference()]
        failures: list[str] = []
        for number, policy in enumerate(options.formats):
            try:
                points.append(self._format(policy, len(options.formats) - number - 1))
            except TierbenchError as error:
                failures.append(f"format {policy.name}: {error}")
                self.progress.say(f"format {policy.name} is left out: {error}")
        points = self._with_speeds(points, failures)
        rows = make_rows(points, options.accept)
        shown = curve_table.to_markdown(rows, points, options.accept, options.published)
        folder = options.folder
        content = curve_table.to_json(options.suite, rows, points, options.accept, options.published)
        write_json(folder / "curve.json", content)
        write_whole(folder / "curve.csv", curve_table.to_csv(rows))
        write_whole(folder / "curve.md", shown)
        if not options.keep_reference:
            for path in options.folder.glob(f"{self.logits.name}*"):
                path.unlink(missing_ok=True)
        return CurveResult(folder, shown, failures)

    def _reference(self) -> Point:
        """Measure full precision or read it back; what is asked of all formats is known from then on."""
        policy = reference_of(self.options.base)
        with closing(self._engine(policy)) as engine:
            began = time.monotonic()
            self.limits = dict(engine.limits)
            accuracy = run_entries(self.options, policy, engine, self.text.today)
            self.items = self._make_items(accuracy.folders, window_of(engine))
            self.speed_requests = speed_requests(self.items, policy, window_of(engine))
            self.asked = self._identity(engine, accuracy)
            self.logits = self._logits_file(policy)
            point = self._kept(policy)
            label = f"format {policy.name}, likelihoods"
            if point is not None and point.storage.limits:  # a curve has one budget, whenever it is continued
                self.limits = {Tier(tier): count for tier, count in point.storage.limits.items()}
            if point is None:
                found = record_reference(engine, self.items, self.logits, self.progress, label)
                point = self._measured(policy, engine, accuracy, found, None, began)
            elif not self.logits.exists() and any(self._kept(p) is None for p in self.options.formats):
                compared = [item for item in self.items if item.compared]
                if compared:
                    record_reference(engine, compared, self.logits, self.progress, label)
            return point

    def _format(self, policy: Policy, left: int) -> Point:
        point = self._kept(policy, say=True)
        if point is not None:
            return point
        began = time.monotonic()
        with closing(self._engine(policy)) as engine:
            accuracy = run_entries(self.options, policy, engine, self.text.today)
            label = f"format {policy.name}, likelihoods"
            found, divergence = compare(engine, self.items, self.logits, self.progress, label)
            point = self._measured(policy, engine, accuracy, found, divergence, began)
        self._spent.append(point.seconds)
        eta = f", about {format_seconds(sum(self._spent) / len(self._spent) * left)} left" if left else ""
        total = len(self.options.formats)
        took = format_seconds(point.seconds)
        self.progress.say(f"format {policy.name} ({total - left} of {total}) in {took}{eta}")
        return point

    def _measured(
        self,
        policy: Policy,
        engine: SweepEngine,
        accuracy: Accuracy,
        found: Likelihoods,
        divergence: Divergence | None,
        began: float,
    ) -> Point:
        """Take bytes as well, and keep all of it."""
        stored = engine.record().stored
        assert stored is not None  # the items have been answered
        storage = measure_storage(engine, policy, stored, self.limits)
        point = Point(
            name=policy.name,
            policy=policy.to_dict(),
            asked=self._asked_of(policy),
            engine=engine.record(),
            created=_now(),
            seconds=time.monotonic() - began,
            storage=storage,
            entries=accuracy.entries,
            answers=found.get("answer"),
            text=found.get("text"),
            last_words=found.get("last_word"),
            divergence=divergence,
        )
        write_point(self._path(policy), point)
        return point

    def _with_speeds(self, points: Sequence[Point], failures: list[str]) -> list[Point]:
        """Measure the speed of those formats that lack it, one after the other in every round; keep it.

        A format that cannot be run any more goes without, and a line is added to ``failures``.
        """
        began = _now()
        policies = {
            policy.name: policy for policy in (reference_of(self.options.base), *self.options.formats)
        }
        turns: dict[str, list[tuple[float, float | None]]] = {p.name: [] for p in points if p.speed is None}
        repeats = self.options.repeats if turns else 0
        for number in range(repeats):
            self.progress.say(f"speed, round {number + 1} of {repeats}, formats: {len(turns)}")
            for name in list(turns):
                try:
                    with closing(self._engine(policies[name])) as engine:
                        turns[name].append(measure_rate(engine, self.speed_requests))
                except TierbenchError as error:
                    failures.append(f"format {name}, speed: {error}")
                    del turns[name]
        return [self._with_speed(point, turns.get(point.name, ()), began) for point in points]

    def _with_speed(self, point: Point, turns: Sequence[tuple[float, float | None]], began: str) -> Point:
        """A point with the rates of its turns, if it had any, which is kept."""
        if not turns:
            return point
        asked = self.speed_requests
        speed = Speed(
            rates=[rate for rate, _ in turns],
            sequences=len(asked),
            prompt_tokens=sum(len(request.prompt) for request in asked),
            new_tokens=asked[0].max_new_tokens,
            began=began,
            others=[others for _, others in turns if others is not None],
        )
        point = replace(point, speed=speed)
        write_point(self.options.folder / "points" / f"{slug(point.name)}.json", point)
        return point

    def _kept(self, policy: Policy, say: bool = False) -> Point | None:
        """The point of an earlier sweep, if it was asked the same; ``say`` tells which is the case."""
        point = read_point(self._path(policy))
        if point is None:
            return None
        stale = point.stale(policy.to_dict(), self._asked_of(policy))
        if say and stale:
            self.progress.say(f"format {policy.name} is measured anew, since these changed: {stale}")
        elif say:
            self.progress.say(f"format {policy.name} was measured before")
        return None if stale else point

    def _asked_of(self, policy: Policy) -> dict[str, Any]:
        """With the content of the format's calibration file, which may change under its name."""
        digest = calibration_digest(policy)
        return self.asked | {"calibration": digest} if digest else self.asked

    def _path(self, policy: Policy) -> Path:
        return self.options.folder / "points" / f"{slug(policy.name)}.json"

    def _engine(self, policy: Policy) -> SweepEngine:
        return self._factory(self.options.settings, policy, self.progress.say)

    def _read_texts(self) -> tuple[str | None, list[str]]:
        """Running text and passages, before anything heavy begins."""
        options = self.options
        text = curve_text.read_text(options.text) if options.text else None
        if text is None and options.dataset:
            text = curve_text.read_dataset(options.dataset)
        return text, curve_text.read_last_words(options.last_word) if options.last_word else []

    def _make_items(self, folders: Sequence[Path], window: int) -> list[Item]:
        options = self.options
        items = curve_items.answers(folders, self.text, options.answers, window, self.chat)
        if self._running_text is not None:
            cap = _DEMO_WINDOW if options.dataset == curve_text.DEMO and not options.text else window
            size = min(window, options.window or cap)
            stride = options.stride or size // 2
            items += curve_items.windows(self.text, self._running_text, size, stride, options.text_tokens)
        items += curve_items.last_words(self.text, self._passages, window)
        if not items:
            raise UsageError(
                "there is nothing whose likelihood could be measured: give run entries with correct answers, "
                "--text, --dataset or --last-word"
            )
        return curve_items.choose_compared(items, options.divergence_tokens)

    def _identity(self, engine: SweepEngine, accuracy: Accuracy) -> dict[str, Any]:
        """All that the measurements of a format depend on besides the format."""
        record, budgets = engine.record(), self.options.settings.budgets
        identity = identity_of(record, record.run_policy(), self.options.settings.seed, self.text)
        parts = {in_words(name): part for name, part in identity.to_dict().items() if part and name != "date"}
        return parts | {
            "device": record.hardware.device,
            "chat": "on" if self.chat else "off",
            "run_entries": [entry.entry for entry in accuracy.entries],
            "instances": digest_of(accuracy.digests),
            "likelihoods": curve_items.digest(self.items),
            "budgets": [budgets.device, budgets.host, budgets.disk],
        }

    def _logits_file(self, policy: Policy) -> Path:
        """Where full precision's logits go; those of another model or other questions are removed."""
        path = self.options.folder / f"reference-{digest_of([self.asked, policy.to_dict()])[:16]}.npy"
        for old in self.options.folder.glob("reference-*.npy*"):
            if old.name not in (path.name, f"{path.name}.crc"):
                old.unlink(missing_ok=True)
        return path


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
