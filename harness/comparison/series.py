"""One system as configured under one setting: which variant, which batch size, what came of every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.baselines.base import Baseline
from harness.baselines.sandbox.environments import Environment
from harness.comparison.options import Cell, CompareOptions, Setting
from harness.comparison.search import search

Record = dict[str, Any]
RunCell = Callable[["Series", Cell], Record]

PROBE_PROMPT, PROBE_TOKENS = 512, 8
PROBE_BATCHES = (4, 1)
"""What variants are compared by: so much that a dtype shows what it is worth at the batch sizes that win;
one sequence where no variant can take more."""


@dataclass
class Series:
    """The rows of one system, configuration and setting."""

    baseline: Baseline
    environment: Environment
    configuration: str
    setting: Setting
    settings: dict[str, Any]
    """Without a variant's until `settle`."""

    own: dict[str, Any]
    """The reader's overrides, which no variant changes."""

    bits: int
    batch: int | None = None
    """Chosen by `settle`."""

    failure: tuple[Cell, Record] | None = None
    """Why there are no repeats."""

    tried: list[tuple[Cell, Record]] = field(default_factory=list)
    """Runs of the probe and the search."""

    repeats: list[tuple[Cell, Record]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As tables and progress call it."""
        return f"{self.baseline.name}/{self.configuration}"

    def expected(self, options: CompareOptions) -> int:
        """Runs that are still to come, at a guess while nothing is settled."""
        if self.failure is not None:
            return 0
        if self.batch is not None:
            return options.repeats - len(self.repeats)
        variants = self.baseline.variants(self.configuration, self.setting.cap_bytes is not None)
        sizes = 0 if self._fixed(options) else options.most_batch.bit_length()
        return (len(variants) if len(variants) > 1 else 0) + sizes + options.repeats

    def _fixed(self, options: CompareOptions) -> int | None:
        return self._named(options.batches)

    def _named(self, sizes: Mapping[str, int]) -> int | None:
        """What is given for the configuration, for the system, or for all."""
        names = (self.name, self.baseline.name, "")
        return next((sizes[name] for name in names if name in sizes), None)

    def cell(self, options: CompareOptions, batch: int, purpose: str, repeat: int = 0) -> Cell:
        """A cell of the whole workload; the sample is scored once, in the first repeat."""
        return Cell(
            self.baseline.name, self.configuration, self.settings, self.setting.cap_bytes, batch,
            options.prompt_len, options.gen_len, purpose, repeat, score=purpose == "repeat" and repeat == 1,
        )  # fmt: skip

    def settle(self, options: CompareOptions, run: RunCell) -> None:
        """Choose variant and batch size by running; leaves a failure where nothing completes."""
        fixed = self._fixed(options)
        first = self.cell(options, fixed or 1, "search")
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
            cell = self.cell(options, batch, "search")
            record = run(self, cell)
            self.tried.append((cell, record))
            return record["generated_tokens_per_s"] if record["status"] == "ok" else None

        self.settings = variants[0]
        if fixed:
            self.batch = fixed
            return
        for self.settings in variants:  # what completes a short run may not complete a whole one
            self.batch = search(measure, options.most_batch, self._named(options.first_batches) or 1).best
            if self.batch is not None:
                return
        self.failure = self.tried[-1]

    def _probe(self, options: CompareOptions, run: RunCell) -> list[dict[str, Any]]:
        """The variants that complete a short run, the fastest first."""
        capped = self.setting.cap_bytes is not None
        known = [
            {**self.settings, **variant, **self.own}
            for variant in self.baseline.variants(self.configuration, capped)
        ]
        different = [one for index, one in enumerate(known) if one not in known[:index]]
        if len(different) == 1:
            return different
        most = self._fixed(options) or options.most_batch
        for batch in sorted({min(size, most) for size in PROBE_BATCHES}, reverse=True):
            found = self._by_speed(different, batch, options, run)
            if found:
                return found
        return []

    def _by_speed(
        self, variants: Sequence[dict[str, Any]], batch: int, options: CompareOptions, run: RunCell
    ) -> list[dict[str, Any]]:
        rates = []
        for index, settings in enumerate(variants):
            cell = Cell(
                self.baseline.name, self.configuration, settings, self.setting.cap_bytes, batch,
                min(PROBE_PROMPT, options.prompt_len), min(PROBE_TOKENS, options.gen_len), "probe",
            )  # fmt: skip
            record = run(self, cell)
            self.tried.append((cell, record))
            if record["status"] == "ok":
                rates.append((-record["generated_tokens_per_s"], index))
        return [variants[index] for _, index in sorted(rates)]
