"""Runs a comparison: the reference, then per memory limit each system's variant and batch size, then repeats.

It knows the order of trials. Each is in the journal as soon as it ends, so the same command given again
continues where it stopped. A system that fails becomes a row with the reason and does not stop the others.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.files.names import check_folder_name
from engine.files.scratch import sweep
from engine.files.whole import write_whole
from engine.limits import processor
from engine.units import format_bytes, format_seconds
from harness.baselines import registry
from harness.baselines.sandbox.environments import environment_of
from harness.comparison import published, rows
from harness.comparison.measure import Bench, Launch, Record, distance, launch
from harness.comparison.options import CompareOptions, MemoryCap, Model, Trial
from harness.comparison.ratios import ratios
from harness.comparison.search import rotated
from harness.comparison.series import Series
from harness.files import JsonLines, digest_of, write_json
from harness.identity import Identity, since
from harness.progress.line import Progress
from harness.suite.table import CHAT_NOTES
from harness.tokenizer import Text

_SHARED = ("prompt_len", "gen_len", "seed", "threads", "device", "repeats")
"""Options that are written beside the rows."""


_KEY_DIGITS = 32


@dataclass(frozen=True)
class ComparisonResult:
    """The rows of a comparison, and where their files are."""

    folder: Path
    rows: Sequence[rows.Row]
    shown: str
    """The tables, or the list of trials of a dry run."""


def run_comparison(options: CompareOptions, started: Launch = launch) -> ComparisonResult:
    """Run a comparison, or with ``dry_run`` only list what would be run.

    Args:
        started: the command line of a child by its environment.
    """
    check_folder_name("--output", options.name, most=100)  # a suite's name begins with it
    return _Comparison(options, started).run()


class _Comparison:
    def __init__(self, options: CompareOptions, started: Launch) -> None:
        self.options = options
        self.model = Model.read(options.model)
        self.chat = bool(options.run_entries) and Text.load(str(options.model)).uses_chat(options.chat)
        self.memory_caps = [MemoryCap.parse(text, self.model.nbytes) for text in options.memory_caps]
        self.series = [
            self._series(baseline, configuration, memory_cap, options.overrides.get(baseline.name, {}))
            for memory_cap in self.memory_caps
            for baseline, configuration in registry.chosen(options.systems)
        ]
        self.progress = Progress()
        self.journal = JsonLines(options.folder / "journal.jsonl")
        self.records: dict[str, Record] = {}
        self.kept_under: dict[str, Mapping[str, str]] = {}
        """What the newest record of each trial depends on, by the trial's digest."""

        self.journal.read(self._take)
        self.work = (options.work or options.output_path / "offload" / "comparisons").resolve()
        self.bench = Bench(options, self.model, self.work, started)
        self.reference: Record = {}
        self.prepared: dict[str, Record] = {}
        self.walls: list[float] = []
        self.said: set[str] = set()
        self.used: set[str] = set()
        """Keys of the records that this command has used."""

    def _take(self, entry: Any) -> None:
        """Take a record from the journal; raises ValueError, KeyError or TypeError for what is none."""
        key, record, trial, identity = (entry[name] for name in ("key", "record", "trial", "identity"))
        if not (isinstance(record["status"], str) and isinstance(record["wall_s"], float)):
            raise ValueError("no record")
        self.records[key], self.kept_under[trial] = record, identity

    def run(self) -> ComparisonResult:
        if self.options.dry_run:
            return ComparisonResult(self.options.folder, [], self._dry_run())
        began = time.monotonic()
        sweep(self.work)
        if self.journal.damaged:
            self.progress.say(self.journal.complaint("is measured again"))
        self._make_reference()
        for series in self.series:
            series.choose(self.options, self._run)
        for memory_cap in self.memory_caps:
            ready = [s for s in self.series if s.memory_cap == memory_cap and s.failure is None]
            for repeat in range(1, self.options.repeats + 1):
                for series in rotated(ready, repeat - 1):
                    assert series.batch is not None
                    trial = series.trial(self.options, series.batch, "repeat", repeat)
                    series.repeats.append((trial, self._run(series, trial)))
        self.progress.say(
            f"comparison: {len(self.used)} runs, {len(self.walls)} of them now, "
            f"in {format_seconds(time.monotonic() - began)}"
        )
        return self._write(self._rows(self._accuracies()))

    @staticmethod
    def _series(
        baseline: registry.Baseline, configuration: str, memory_cap: MemoryCap, own: Mapping[str, Any]
    ) -> Series:
        settings = registry.settings_of(baseline, configuration, own)
        bits = baseline.configurations[configuration].bits
        environment = environment_of(baseline)
        return Series(baseline, environment, configuration, memory_cap, settings, dict(own), bits)

    def _make_reference(self) -> None:
        """transformers in float32, all in memory: the tokens and log-probabilities to compare with."""
        cap, own = MemoryCap("reference", None), {"dtype": "float32"}
        series = self._series(registry.get(registry.REFERENCE), "full", cap, own)
        trial = replace(series.trial(self.options, self.options.sample, "reference"), score=True)
        self.reference = self._run(series, trial)
        if self.reference["status"] != "ok":
            self.progress.say(f"no reference: transformers {self.reference['reason']}")
            return
        tokens = dict(enumerate(self.reference["tokens"]))
        self.bench = replace(self.bench, expected=tokens)

    def _run(self, series: Series, trial: Trial) -> Record:
        """A trial's record, from the journal or from a child."""
        identity = self._identity(series)
        key = digest_of([identity.digest, trial.digest])[:_KEY_DIGITS]
        known = self.records.get(key)
        if known is None:
            self._say_changes(identity, trial)
        if known is None or not self._is_final(key, known):
            known = self._prepare(series, trial)
            if known["status"] == "ok":
                known = self.bench.run(series.environment, trial)
            self.walls.append(known["wall_s"])
            entry = {"key": key, "trial": trial.digest, "identity": identity.to_dict(), "record": known}
            self.journal.add(entry)
            self.records[key] = known
            self._show_progress(series, trial, known)
        self.used.add(key)
        return known

    def _say_changes(self, identity: Identity, trial: Trial) -> None:
        """Say once why a trial is run again that an earlier command has run."""
        before = self.kept_under.get(trial.digest)
        changed = since(parts) if before and (parts := identity.changed_from(before)) else ""
        if changed and changed not in self.said:
            self.said.add(changed)
            self.progress.say(f"records of an earlier comparison are not used{changed}")

    def _show_progress(self, series: Series, trial: Trial, record: Record) -> None:
        """One line per trial: its outcome, and how long the rest takes at the mean time per trial."""
        cap = f" under {format_bytes(trial.cap_bytes)}" if trial.cap_bytes else ""
        rate = record.get("generated_tokens_per_s")
        outcome = f"{rate:,.2f} token/s" if rate else f"{record['status']}: {record['reason']}"
        left = sum(one.expected(self.options) for one in self.series) - (trial.purpose == "repeat")
        eta = format_seconds(left * sum(self.walls) / len(self.walls))
        self.progress.say(
            f"{series.name}{cap}, {trial.purpose} {trial.repeat or ''} batch {trial.batch}: {outcome} "
            f"({record['wall_s']:.0f} s); at most {left} runs, about {eta} left"
        )

    def _is_final(self, key: str, record: Record) -> bool:
        """Whether a record of an earlier command is final: failures and shorter time-outs are tried again."""
        if key in self.used:
            return True
        if record["status"] == "timeout":
            return float(record["wall_s"]) >= 0.9 * self.options.timeout_s
        return record["status"] != "failed"

    def _prepare(self, series: Series, trial: Trial) -> Record:
        """Derive a system's files, once per command and settings."""
        key = json.dumps([series.baseline.name, trial.settings], sort_keys=True)
        if key not in self.prepared:
            if type(series.baseline).prepare is registry.Baseline.prepare:
                self.prepared[key] = {"status": "ok", "reason": "", "wall_s": 0.0}
            else:
                self.prepared[key] = self.bench.prepare(series.environment, trial)
        return self.prepared[key]

    def _identity(self, series: Series) -> Identity:
        """What a record depends on besides its trial."""
        options, expected = self.options, sorted(self.bench.expected.items())
        return Identity(
            weights=self.model.digest,
            seed=str(options.seed),
            device=options.device,
            placement=f"threads={options.threads}",
            system=digest_of(series.packages),
            reference=digest_of(expected) if expected else "",
            settings=f"sample={options.sample}",
        )

    def _accuracies(self) -> list[rows.Row]:
        if not self.options.run_entries:
            return []
        from harness.comparison.accuracy import accuracies

        return accuracies(self.options, self.model, self.bench, self.series, self.progress)

    def _rows(self, accuracies: Sequence[rows.Row]) -> list[rows.Row]:
        workload = f"random prompts of {self.options.prompt_len}, {self.options.gen_len} generated"
        found = []
        for series in self.series:
            pairs = [series.failure] if series.failure is not None else series.repeats
            known = [
                row["accuracy"]
                for row in accuracies
                if (row["system"], row["configuration"], row["setting"])
                == (series.baseline.name, series.configuration, series.memory_cap.label)
                and row["accuracy"] is not None
            ]
            for trial, record in pairs:
                row = rows.row_of(trial, record, self.model, series.memory_cap, series.bits, workload)
                right = self.reference.get("logprobs")
                if right and "logprobs" in record:
                    row["logit_distance"] = distance(record["logprobs"], right)
                row["accuracy"] = sum(known) / len(known) if known else None
                found.append(row)
        names = [series.baseline.name for series in self.series]
        return [*found, *accuracies, *published.rows(names)]

    def _write(self, found: list[rows.Row]) -> ComparisonResult:
        folder = self.options.folder
        rows.write(found, folder)
        tried = [
            rows.row_of(trial, record, self.model, series.memory_cap, series.bits, f"search: {trial.purpose}")
            for series in self.series
            for trial, record in series.tried
        ]
        rows.write(tried, folder, "search")
        main = [row for row in found if not str(row["workload"]).startswith("run entry")]
        shown = rows.to_markdown(main, ratios(main, registry.OURS), registry.OURS)
        entries = [row for row in found if str(row["workload"]).startswith("run entry")]
        if entries:
            shown += rows.entries_markdown(entries, self.chat)
        write_whole(folder / "comparison.md", shown)
        write_json(folder / "comparison.json", self._about())
        return ComparisonResult(folder, found, shown)

    def _about(self) -> dict[str, Any]:
        """What all rows share."""
        options = self.options
        return {
            "kind": "measured",
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "model": {key: getattr(self.model, key) for key in ("name", "nbytes", "vocabulary", "digest")}
            | {"folder": self.model.name},
            **{key: getattr(options, key) for key in _SHARED},
            "chat": "on" if self.chat else "off",
            "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
            "reference": {key: self.reference.get(key) for key in ("status", "reason", "tokens", "versions")},
            "choices": {
                series.baseline.name: {"title": series.baseline.title, "choices": series.baseline.choices}
                for series in self.series
            },
        }

    def _dry_run(self) -> str:
        lines = [f"{self.model.name}: {format_bytes(self.model.nbytes)} of weights, "
                 f"prompts of {self.options.prompt_len}, {self.options.gen_len} generated"]  # fmt: skip
        if self.options.run_entries:
            lines.append(CHAT_NOTES[self.chat])
        for memory_cap in self.memory_caps:
            lines.append(f"{memory_cap.label}:")
            for series in (one for one in self.series if one.memory_cap == memory_cap):
                why = series.environment.missing
                runs = f"not run: {why}" if why else f"at most {series.expected(self.options)} runs"
                chosen = ", ".join(f"{key}={value}" for key, value in series.settings.items())
                lines.append(f"  {series.name}: {runs}; {chosen}")
                if not why:
                    lines.append(f"    {' '.join(self.bench.started(series.environment))}")
        return "\n".join(lines) + "\n"
