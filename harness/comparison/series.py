"""One system's configuration under one memory limit: its variant, its batch size and all of its trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.baselines.base import Baseline
from harness.baselines.sandbox.environments import Environment
from harness.comparison.options import CompareOptions, MemoryCap, Record, Trial
from harness.comparison.search import search

RunTrial = Callable[["Series", Trial], Record]

PROBE_PROMPT, PROBE_TOKENS = 512, 8
"""The most prompt and generated tokens of a probe of variants."""

PROBE_BATCHES = (4, 1)
"""Batch sizes of the probe: large enough to show what a dtype gains; 1 where no variant can take more."""


@dataclass
class Series:
    """One system's configuration under one memory limit."""

    baseline: Baseline
    environment: Environment
    configuration: str
    memory_cap: MemoryCap
    settings: dict[str, Any]
    """`choose` adds the variant's."""

    own: dict[str, Any]
    """The user's overrides, which no variant changes."""

    bits: int
    batch: int | None = None
    """Set by `choose`."""

    failure: tuple[Trial, Record] | None = None
    """Why there are no repeats."""

    tried: list[tuple[Trial, Record]] = field(default_factory=list)
    """Trials of the probe and the search."""

    repeats: list[tuple[Trial, Record]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name in tables and progress lines."""
        return f"{self.baseline.name}/{self.configuration}"

    @property
    def packages(self) -> dict[str, str]:
        """Versions of what the system consists of."""
        if self.environment.own:
            return self.baseline.versions()
        return dict((self.environment.stamp or {}).get("packages") or {})

    def expected(self, options: CompareOptions) -> int:
        """How many trials are still to come; an upper bound until `choose` has run."""
        if self.failure is not None:
            return 0
        if self.batch is not None:
            return options.repeats - len(self.repeats)
        variants = self.baseline.variants(self.configuration, self.memory_cap.nbytes is not None)
        sizes = 0 if self._named(options.batches) else options.most_batch.bit_length()
        return (len(variants) if len(variants) > 1 else 0) + sizes + options.repeats

    def _named(self, sizes: Mapping[str, int]) -> int | None:
        """The size given for the configuration, else for the system, else for all."""
        names = (self.name, self.baseline.name, "")
        return next((sizes[name] for name in names if name in sizes), None)

    def trial(self, options: CompareOptions, batch: int, purpose: str, repeat: int = 0) -> Trial:
        """A trial of the whole workload; the sample is scored in the first repeat only."""
        return Trial(
            self.baseline.name, self.configuration, self.settings, self.memory_cap.nbytes, batch,
            options.prompt_len, options.gen_len, purpose, repeat, score=purpose == "repeat" and repeat == 1,
        )  # fmt: skip

    def choose(self, options: CompareOptions, run: RunTrial) -> None:
        """Choose variant and batch size by trials; sets ``failure`` if none completes."""
        fixed = self._named(options.batches)
        first = self.trial(options, fixed or 1, "search")
        if self.environment.missing:
            status = "not_run" if self.baseline.not_run else "not_installed"
            self.failure = first, {"status": status, "reason": self.environment.missing}
            return
        if options.device not in self.baseline.devices:
            reason = f"runs on {', '.join(self.baseline.devices)}, not on {options.device}"
            self.failure = first, {"status": "not_run", "reason": reason}
            return
        variants = self._probe(options, run)
        if not variants:
            self.failure = self.tried[-1]
            return

        def measure(batch: int) -> float | None:
            trial = self.trial(options, batch, "search")
            record = run(self, trial)
            self.tried.append((trial, record))
            return record["generated_tokens_per_s"] if record["status"] == "ok" else None

        self.settings = variants[0]
        if fixed:
            self.batch = fixed
            return
        for self.settings in variants:  # a variant that completes the probe may fail the whole workload
            self.batch = search(measure, options.most_batch, self._named(options.first_batches) or 1)
            if self.batch is not None:
                return
        self.failure = self.tried[-1]

    def _probe(self, options: CompareOptions, run: RunTrial) -> list[dict[str, Any]]:
        """The variants that complete a short trial, the fastest first."""
        capped = self.memory_cap.nbytes is not None
        known = [
            {**self.settings, **variant, **self.own}
            for variant in self.baseline.variants(self.configuration, capped)
        ]
        different = [one for index, one in enumerate(known) if one not in known[:index]]
        if len(different) == 1:
            return different
        most = self._named(options.batches) or options.most_batch
        for batch in sorted({min(size, most) for size in PROBE_BATCHES}, reverse=True):
            found = self._by_speed(different, batch, options, run)
            if found:
                return found
        return []

    def _by_speed(
        self, variants: Sequence[dict[str, Any]], batch: int, options: CompareOptions, run: RunTrial
    ) -> list[dict[str, Any]]:
        rates = []
        for index, settings in enumerate(variants):
            trial = Trial(
                self.baseline.name, self.configuration, settings, self.memory_cap.nbytes, batch,
                min(PROBE_PROMPT, options.prompt_len), min(PROBE_TOKENS, options.gen_len), "probe",
            )  # fmt: skip
            record = run(self, trial)
            self.tried.append((trial, record))
            if record["status"] == "ok":
                rates.append((-record["generated_tokens_per_s"], index))
        return [variants[index] for _, index in sorted(rates)]
