"""Accuracy of every system on HELM run entries: a suite that a child process of another system answers.

HELM builds the requests and scores the answers as in any suite; only who answers differs. A system is asked
for as many tokens as a request allows, in groups of prompts of equal length; what follows a stop is cut off
here, in the same way for all. So run entries give accuracy and no speed: prompts of different lengths are not
batched, which would be unfair to whoever can. Log-probabilities are the system's own, from its scoring of
prompt and answer.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.errors import StorageError, TierbenchError, UsageError
from engine.spec.policy import Policy
from engine.spec.record import AnsweredBy, EngineRecord
from engine.spec.request import CallProgress, Output, Request
from engine.spec.settings import EngineSettings
from harness.baselines.sandbox.child import Child, ChildError
from harness.comparison.measure import Bench
from harness.comparison.options import CompareOptions, Model, Trial
from harness.comparison.rows import Row, row_of
from harness.comparison.series import Series
from harness.files import write_json
from harness.progress.line import Progress
from harness.suite.manifest import kept_date
from harness.suite.options import SuiteOptions, open_suite
from harness.suite.policy_run import answer, open_run
from harness.suite.requests import build_requests
from harness.suite.runner import prepare, write
from harness.suite.scoring import rows_of, score, total_of
from harness.suite.table import SuiteRow

WORKLOAD = "run entry"


class _NoTrace:
    """Another system's streams are not seen."""

    def write_chrome(self, path: Path) -> None:
        """Write a trace without events."""
        write_json(path, {"traceEvents": []})


class SystemEngine:
    """Another system in a child process, which answers a suite; see `harness.engines.protocol.EngineLike`.

    Attributes:
        spec: the model as data, read once from its headers.
    """

    def __init__(self, series: Series, bench: Bench, settings: EngineSettings) -> None:
        """Describe the model; the child is started by the first `answer`."""
        from engine.engine import Engine

        with Engine(settings) as engine:
            self.spec, self._record = engine.spec, engine.record()
        self.trace = _NoTrace()
        self._series, self._bench = series, bench
        self._child: Child | None = None
        self._peak = 0

    def check(self, requests: Sequence[Request]) -> None:
        """Nothing is planned for another system."""

    def answer(
        self,
        requests: Sequence[Request],
        *,
        on_output: Callable[[int, Output], None] | None = None,
        on_progress: Callable[[CallProgress], None] | None = None,
    ) -> list[Output]:
        """Answer in groups of equal prompts and lengths.

        Raises:
            UsageError: for a request that samples, which no two systems do alike.
            StorageError: if the child fails; what was answered stands.
        """
        if any(request.temperature or request.forced for request in requests):
            raise UsageError("a comparison answers greedily: run entries with a temperature are left out")
        groups: dict[tuple[int, int], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault((len(request.prompt), request.max_new_tokens), []).append(index)
        size = self._series.batch or 1
        done: dict[int, Output] = {}
        seconds = 0.0
        try:
            self._start(requests)
            for (_, new), members in groups.items():
                for start in range(0, len(members), size):
                    part = members[start : start + size]
                    outputs = self._group([requests[index] for index in part], new)
                    for index, output in zip(part, outputs, strict=True):
                        done[index] = output
                        if on_output is not None:
                            on_output(index, output)
                    seconds += outputs[0].block_seconds
                    if on_progress is not None:
                        left = (len(requests) - len(done)) * seconds / len(done)
                        generated = sum(len(output.tokens) for output in done.values())
                        prompt = sum(len(requests[index].prompt) for index in done)
                        on_progress(
                            CallProgress(
                                len(done), len(requests), len(done), generated, prompt, seconds, left
                            )
                        )
        except ChildError as error:
            raise StorageError(f"{self._series.name}: {error.status}, {error.reason}") from error
        return [done[index] for index in range(len(requests))]

    def record(self) -> EngineRecord:
        """Our engine's account of the model, with who really answered."""
        if self._child is not None:
            self._peak = self._child.peak()
        series = self._series
        by = AnsweredBy(
            series.baseline.name, series.configuration, series.settings, self._peak, series.packages
        )
        return replace(self._record, answered_by=by)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _start(self, requests: Sequence[Request]) -> None:
        if self._child is not None:
            return
        longest = max(len(request.prompt) for request in requests)
        new = max(1, *(request.max_new_tokens for request in requests))
        trial = Trial(
            self._series.baseline.name, self._series.configuration, self._series.settings,
            self._series.memory_cap.nbytes, self._series.batch or 1, longest, new, "accuracy",
        )  # fmt: skip
        self._child = self._bench.loaded(self._series.environment, trial)

    def _group(self, requests: Sequence[Request], new: int) -> list[Output]:
        """One call for prompts of equal length, then one to score what is asked for."""
        assert self._child is not None
        timeout = self._bench.options.timeout_s
        tokens: list[list[int]] = [[] for _ in requests]
        seconds = 0.0
        if new:
            prompts = [list(request.prompt) for request in requests]
            answer = self._child.ask("generate", timeout, prompts=prompts, new_tokens=new)
            tokens = answer["tokens"]
            seconds = answer["prefill_s"] + answer["decode_s"]
        cut = [stopped(request, row) for request, row in zip(requests, tokens, strict=True)]
        wanted = [index for index, request in enumerate(requests) if request.prompt_logprobs or cut[index][0]]
        sequences = [[*requests[index].prompt, *cut[index][0]] for index in wanted]
        scored = dict(zip(wanted, self._scores(sequences, timeout), strict=True))
        found = []
        for index, (request, (row, reason)) in enumerate(zip(requests, cut, strict=True)):
            values = scored.get(index, [])
            middle = len(request.prompt) - 1
            found.append(
                Output(
                    tokens=tuple(row),
                    logprobs=tuple(values[middle:]),
                    prompt_logprobs=tuple(values[:middle]) if request.prompt_logprobs else None,
                    finish_reason=reason,
                    block_size=float(len(requests)),
                    block_seconds=seconds,
                )
            )
        return found

    def _scores(self, sequences: Sequence[Sequence[int]], timeout: float) -> list[list[float]]:
        """From a system that gives none: not a number, which is what is known."""
        assert self._child is not None
        if not sequences:
            return []
        try:
            answer = self._child.ask("score", timeout, sequences=sequences)
        except ChildError as error:
            if error.status != "unsupported":
                raise
            return [[math.nan] * (len(ids) - 1) for ids in sequences]
        rows: list[list[float]] = answer["logprobs"]
        return rows


def stopped(request: Request, tokens: Sequence[int]) -> tuple[list[int], Any]:
    """The tokens up to where the request stops, and the reason, as the engine has them."""
    kept: list[int] = []
    for token in tokens[: request.max_new_tokens]:
        kept.append(token)
        if token in request.stop_token_ids:
            return kept, "eos"
        if request.stop is not None and request.stop(kept):
            return kept, "stop"
    return kept, "length"


def accuracies(
    options: CompareOptions, model: Model, bench: Bench, series: Sequence[Series], progress: Progress
) -> list[Row]:
    """One row per run entry, system and memory cap; a system that failed before is skipped."""
    found: list[Row] = []
    for one in series:
        if one.failure is not None:
            continue
        trial = one.trial(options, one.batch or 1, "accuracy", 1)
        common: dict[str, Any] = {"command": bench.started(one.environment)}
        try:
            lines = _suite_rows(options, model, bench, one)
        except TierbenchError as error:
            progress.say(f"{one.name}: {error}")
            record = {"status": "failed", "reason": str(error), **common}
            for entry in options.run_entries:
                found.append(row_of(trial, record, model, one.memory_cap, one.bits, f"{WORKLOAD} {entry}"))
            continue
        enforced = "as in the timed runs" if one.memory_cap.nbytes else "no limit asked for"
        for line in lines:
            record = {
                "status": "ok",
                "reason": line.metric,
                "accuracy": line.accuracy,
                "cap_enforced": enforced,
                **common,
            }
            row = row_of(trial, record, model, one.memory_cap, one.bits, f"{WORKLOAD} {line.run_entry}")
            found.append(row | {"prompt_len": None, "gen_len": None})
    return found


def _suite_rows(options: CompareOptions, model: Model, bench: Bench, series: Series) -> list[SuiteRow]:
    """The table of a suite that the system answers, as far as its runs could be scored."""
    label = f"{series.name}-{series.memory_cap.nbytes or 'all'}".replace("/", "-")
    policy, suites = Policy(name=label), options.output_path / "runs"
    suite_options = SuiteOptions(
        settings=EngineSettings(
            str(model.folder), seed=options.seed, offload_dir=options.output_path / "offload"
        ),
        model_name=model.name,
        policies=[policy],
        suite=f"comparison-{options.name}-{label}",
        output_path=options.output_path,
        run_entries=options.run_entries,
        max_eval_instances=options.max_eval_instances,
        plugins=options.plugins,
        today=kept_date(suites.glob(f"comparison-{glob.escape(options.name)}-*/policies/*/manifest.json")),
        chat=options.chat,
    )
    with (
        open_suite(suite_options) as suite,
        closing(SystemEngine(series, bench, suite_options.settings)) as system,
    ):
        run = open_run(suite, policy, system)
        requests = build_requests(suite, [run.deployment])
        prepare(suite, [run], requests)
        manifest, failures = score(suite, run, requests, answer(suite, run, requests))
        rows = rows_of(suite, run, requests, failures)
        write(suite, rows, [total_of(run, requests, manifest)], {policy.name: manifest})
        return rows
