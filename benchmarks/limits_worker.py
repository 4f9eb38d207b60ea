"""Measures a group of limits.py, a shape and a setting: a sweep over blocks, then repeats of the best."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.bounds import Rates, Work, bound, pass_work
from benchmarks.cells import DECODE_SECONDS, LOADS, PREFILL_SECONDS, SETTINGS, block_of
from benchmarks.page_cache import drop
from benchmarks.passes import have_memory, past_filled, set_block, timed
from benchmarks.rates import DiskRates, MemoryRate, ProductRates, kernels
from benchmarks.records import Repetition, RepetitionLog, say
from benchmarks.synthetic import checkpoint, own_store, prompts
from engine.engine import Engine
from engine.errors import BudgetError, TierbenchError
from engine.spec.policy import Policy
from engine.spec.request import Request

KEYS = ("shape", "layers", "setting", "variant", "kind", "prompt", "context", "block", "repeat")
PREFILL, DECODE, CHECK = "prefill", "decode", "decode after real prompts"
_LIKELY = 0.6  # of the bound, for predictions of time
_FRESH_SECONDS = 3.0
_MAX_PASSES = 6


def measure_group(options: argparse.Namespace) -> int:
    """Measure the group that the command line names; returns the exit code."""
    shape, setting = options.worker
    log = RepetitionLog(options.out, KEYS)
    for variant in SETTINGS[setting]:
        try:
            with ExitStack() as stack:
                Group(shape, setting, variant, options, log, stack).run()
        except TierbenchError as error:
            say(f"{shape}, {setting}, {variant}: {error}")
            log.add({"shape": shape, "layers": options.layers, "setting": setting, "variant": variant,
                     "kind": "refused", "why": str(error)})  # fmt: skip
    return 0


class Group:
    """One engine whose block, prompts and contexts change while its weights stay in place."""

    def __init__(
        self,
        shape: str,
        setting: str,
        variant: str,
        options: argparse.Namespace,
        log: RepetitionLog,
        stack: ExitStack,
    ) -> None:
        self._options, self._log = options, log
        self._name: Repetition = {
            "shape": shape,
            "layers": options.layers,
            "setting": setting,
            "variant": variant,
        }
        self._prefill_limit = options.prefill_seconds or PREFILL_SECONDS[shape]
        self._decode_limit = DECODE_SECONDS[shape]
        self._until: float = options.until or float("inf")
        self._blocks = options.blocks.split(",")
        model = checkpoint(options.work, shape, options.layers)
        offload: Path = options.work / "offload"
        self._cold = [model, offload, own_store(options.work)]
        policy = Policy.parse(variant)
        self._writes_disk = policy.kv.disk > 0
        self._uses_disk = self._writes_disk or policy.weights.disk > 0
        self._disk = DiskRates(offload) if self._uses_disk else None
        if self._disk is not None:
            stack.callback(self._disk.close)
        self._memory = MemoryRate()
        self._engine = stack.enter_context(Engine(model, policy, offload_dir=offload))
        self._rates: dict[int, tuple[float, Rates]] = {}

    def run(self) -> None:
        """Load, sweep, repeat."""
        set_block(self._engine, 1, 1, 8)
        begin = time.perf_counter()
        self._engine.answer([Request((5,) * 8, 2)])
        say(f"{self._label()}: loaded in {time.perf_counter() - begin:.0f} s")
        self._products = ProductRates(self._engine)
        lengths = [int(text) for text in self._options.prompts.split(",")]
        for prompt in lengths:
            contexts = sorted({c for load in LOADS if load.prompt == prompt for c in load.contexts})
            for repeat in range(self._options.repeats):
                for row in self._rows(prompt, contexts, repeat):
                    if time.time() > self._until:
                        say(f"{self._label()}: stopped, its time is used up")
                        return
                    self._measure(row)

    def _rows(self, prompt: int, contexts: list[int], repeat: int) -> Iterator[Repetition]:
        """The repetitions to measure: first every block, then the best ones."""
        for kind, places in ((DECODE, contexts), (PREFILL, [0]), (CHECK, [prompt])):
            if kind == CHECK and not self._options.check_filled:
                continue
            for block in self._blocks if repeat == 0 else self._best(kind, prompt):
                for context in places if block in self._best(kind, prompt) else places[:1]:
                    yield {**self._name, "kind": kind, "prompt": prompt, "context": context,
                           "block": block, "repeat": repeat}  # fmt: skip

    def _best(self, kind: str, prompt: int) -> list[str]:
        """The block with the highest ratio in the sweep; empty if none could be measured."""
        found: dict[str, list[float]] = {}
        for row in self._log.rows:
            same = all(row.get(key) == value for key, value in self._name.items())
            if same and row["kind"] == kind and row.get("prompt") == prompt and "ratio" in row:
                found.setdefault(row["block"], []).append(row["ratio"])
        if not found:
            return []
        return [max(found, key=lambda block: statistics.median(found[block]))]

    def _measure(self, row: Repetition) -> None:
        """Measure one repetition, unless it is in the log, does not fit or would take too long."""
        if self._log.has(row):
            return
        batch, batches = block_of(row["block"])
        count, kind = batch * batches, row["kind"]
        filled = kind == DECODE
        length = row["context"] + 1 if filled else row["prompt"]
        set_block(self._engine, batch, batches, length, filled)
        vocabulary = self._engine.spec.vocab_size
        ids = prompts(count, length, vocabulary, seed=row["repeat"])
        try:
            plan = self._engine.check([Request(prompt, 4) for prompt in ids])
        except BudgetError as error:
            self._log.add({**row, "skipped": str(error)})
            return
        rows = batch if kind != PREFILL else batch * row["prompt"]

        def work_of(step: int) -> Work:
            past = row["context"] + step if kind != PREFILL else 0
            fresh = 1 if kind != PREFILL else row["prompt"]
            return pass_work(self._engine.spec, self._engine.policy, plan, [fresh] * count, [past] * count)

        before = self._rates_at(rows, batch)
        guess = bound(work_of(1), before).seconds / _LIKELY
        prefill = 0.0
        if kind == CHECK:  # its prompts are computed first
            fresh = [row["prompt"]] * count
            work = pass_work(self._engine.spec, self._engine.policy, plan, fresh, [0] * count)
            prefill = bound(work, before).seconds / _LIKELY
        limit = self._decode_limit if filled else self._prefill_limit
        if guess + prefill > limit:
            why = f"predicted {guess + prefill:.0f} s a pass"
            self._log.add({**row, "skipped": why, "rates": asdict(before), "again": True})
            return
        passes = 1 if kind == PREFILL else max(2, min(_MAX_PASSES, int(self._decode_limit / guess)))
        self._take(row, ids, passes, rows, batch, before, work_of)

    def _take(
        self,
        row: Repetition,
        ids: list[tuple[int, ...]],
        passes: int,
        rows: int,
        batch: int,
        before: Rates,
        work_of: Callable[[int], Work],
    ) -> None:
        cold = drop(self._cold, not self._options.no_drop_caches)
        requests = [Request(prompt, passes + 1) for prompt in ids]
        if row["kind"] == PREFILL:  # other kinds leave the first pass out
            have_memory(self._engine, requests)
        began = time.perf_counter()
        try:
            with ExitStack() as stack:
                if row["kind"] == DECODE:
                    stack.enter_context(past_filled())
                seconds = timed(self._engine, requests, self._cold)
        except TierbenchError as error:
            self._log.add({**row, "skipped": str(error)})
            return
        spent = time.perf_counter() - began
        after = self._rates_at(rows, batch, fresh=True)
        rates = before.mean(after)
        # The first decode pass fetches what nothing could prefetch, and its caches were just written.
        kept = seconds[:1] if row["kind"] == PREFILL else seconds[1 : passes + 1]
        offset = 0 if row["kind"] == PREFILL else 1
        bounds = [bound(work_of(offset + step), rates) for step in range(len(kept))]
        ratios = [limit.seconds / taken for limit, taken in zip(bounds, kept, strict=True)]
        in_order = [limit.in_order / taken for limit, taken in zip(bounds, kept, strict=True)]
        found: dict[str, Any] = {
            "seconds": kept,
            "bound_seconds": bounds[0].seconds,
            "ratio": statistics.median(ratios),
            "in_order_ratio": statistics.median(in_order),
            "stream": bounds[0].stream,
            "streams": dict(bounds[0].streams),
            "busy": {name: asdict(use) for name, use in self._engine.trace.summary(sum(seconds)).items()},
            "rates": asdict(rates),
            "before": asdict(before),
            "after": asdict(after),
            "work": asdict(work_of(offset)),
            "sequences": len(ids),
            "all_seconds": spent,
            "cold": cold,
            "kernels": kernels(),
            "disk_settings": self._disk.settings if self._disk else None,
            "disk_direct": self._disk.direct if self._disk else None,
        }
        self._log.add({**row, **found})
        say(
            f"{self._label()}: {row['kind']} {row['prompt']} at {row['context']}, block {row['block']}, "
            f"#{row['repeat']}: {found['ratio']:.2f} of {found['stream']} "
            f"({statistics.median(kept) * 1e3:.0f} ms a pass)"
        )

    def _rates_at(self, rows: int, head_rows: int, fresh: bool = False) -> Rates:
        """Rates of the streams alone, measured now, or a moment ago for the same number of rows."""
        known = self._rates.get(rows)
        if known is not None and not fresh and time.monotonic() - known[0] < _FRESH_SECONDS:
            return known[1]
        rates = Rates(
            disk_read=self._disk.read() if self._disk else 0.0,
            disk_write=self._disk.write() if self._disk and self._writes_disk else 0.0,
            memory=self._memory.read(),
            layers=self._products.layers(rows),
            head=self._products.head(head_rows),
        )
        self._rates[rows] = time.monotonic(), rates
        return rates

    def _label(self) -> str:
        return f"{self._name['shape']}, {self._name['setting']} ({self._name['variant']})"
