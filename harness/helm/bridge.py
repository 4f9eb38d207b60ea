"""Runs HELM around the engine: HELM's own runner builds the requests, scores the answers, writes files.

It knows HELM's runner, and of the answers only that a function gives one per request. A run is walked
twice by HELM's own code: the first time its requests are recorded and the walk is left; the second
time it is given the answers. Each scenario is built once for all policies and both walks.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from helm.benchmark import runner
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import ExecutionSpec, Executor
from helm.benchmark.metrics.metric import create_metric
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.scenarios.scenario import Instance, Scenario, ScenarioSpec, create_scenario
from helm.common.authentication import Authentication
from helm.common.request import Request, RequestResult

from engine.errors import DISK_FAILURES, TierbenchError, UsageError, first_line, storage_errors
from harness.environment import short_network_timeout
from harness.files import SuiteStore
from harness.helm.entries import SuiteRun

AnswerFunction = Callable[[Request], RequestResult]


class _Recorded(Exception):
    """Leaves HELM's runner once the requests of a run are known."""

    def __init__(self, state: ScenarioState) -> None:
        self.state = state


class _Recorder(Executor):
    def execute(self, scenario_state: ScenarioState) -> NoReturn:
        raise _Recorded(scenario_state)


class _Replayer(Executor):
    answer: AnswerFunction

    def process(self, state: RequestState) -> RequestState:
        return replace(state, result=self.answer(state.request))


class SuiteRunner:
    """Records and replays the runs of one suite.

    Args:
        store: where the runs go; a run appears in its place only when all its files are written.
        local_path: HELM's configuration folder (``prod_env``).

    Raises:
        StorageError: if a folder cannot be made.
    """

    def __init__(self, store: SuiteStore, local_path: Path) -> None:
        self._store = store
        with storage_errors(local_path, "make", "choose another --local-path"):
            local_path.mkdir(parents=True, exist_ok=True)
        runner.set_benchmark_output_path(str(store.output_path))
        spec = ExecutionSpec(url=None, auth=Authentication(""), local_path=str(local_path), parallelism=1)
        self._runner = runner.Runner(
            spec,
            output_path=str(store.output_path),
            suite=store.suite,
            skip_instances=False,
            cache_instances=False,
            cache_instances_only=False,
            skip_completed_runs=False,
            exit_on_error=True,
        )
        self._runner.runs_path = str(store.staging)
        self._recorder, self._replayer = _Recorder(spec), _Replayer(spec)
        self._scenarios: dict[ScenarioSpec, Scenario] = {}

    def create_metrics(self, runs: Sequence[SuiteRun]) -> None:
        """Create every metric once, so that a missing dependency shows before hours of generation.

        Raises:
            UsageError: if a metric cannot be created.
        """
        with short_network_timeout():  # some modules try to download word lists when imported
            for run in runs:
                for spec in run.spec.metric_specs:
                    try:
                        create_metric(spec)
                    except Exception as error:  # whatever a missing dependency raises
                        raise UsageError(
                            f"run entry {run.entry!r}: its metric {spec.class_name.rsplit('.', 1)[-1]} "
                            f"cannot be created ({first_line(error)}): install what it needs or leave it out"
                        ) from error

    def record(self, run: SuiteRun) -> list[RequestState]:
        """Build the requests of a run; nothing is asked.

        Raises:
            UsageError: if its scenario cannot be built.
            StorageError: if the disk is full.
        """
        self._runner.executor = self._recorder
        try:
            self._run_one(run.spec)
        except _Recorded as recorded:
            return recorded.state.request_states
        except TierbenchError:
            raise
        except Exception as error:  # whatever a scenario raises, most often a failed download
            self._refuse_disk(error)
            raise UsageError(
                f"run entry {run.entry!r}: its instances cannot be built "
                f"({type(error).__name__}: {first_line(error)}); see {self._store.log}"
            ) from error
        raise AssertionError("HELM's runner finished a run without executing it")

    def replay(self, run: SuiteRun, answer: AnswerFunction) -> str:
        """Score a run with the answers and write its files; returns their digest.

        Raises:
            UsageError: if a metric fails.
            StorageError: if the files cannot be written.
        """
        self._replayer.answer = answer
        self._runner.executor = self._replayer
        try:
            self._run_one(run.spec)
        except TierbenchError:
            raise
        except Exception as error:  # whatever a metric raises
            self._refuse_disk(error)
            raise UsageError(
                f"run {run.spec.name!r} cannot be scored ({type(error).__name__}: {first_line(error)}); "
                f"its answers are kept and are not computed again; see {self._store.log}"
            ) from error
        return self._store.publish(run.spec.name)

    def _refuse_disk(self, error: Exception) -> None:
        """Raise StorageError if the disk is the reason; downloads raise OSErrors of their own."""
        if isinstance(error, OSError) and error.errno in DISK_FAILURES:
            with storage_errors(Path(os.fsdecode(error.filename or self._store.staging)), "write"):
                raise error

    def _run_one(self, spec: RunSpec) -> None:
        # HELM's runner looks this function up in its module, and offers no other way to share instances.
        runner.create_scenario = self._scenario
        try:
            self._runner.run_one(spec)
        finally:
            runner.create_scenario = create_scenario

    def _scenario(self, spec: ScenarioSpec) -> Scenario:
        """The scenario of a spec, which remembers its instances (they are frozen) after the first time."""
        if spec not in self._scenarios:
            scenario = create_scenario(spec)
            build, built = scenario.get_instances, dict[str, list[Instance]]()

            def get_instances(output_path: str) -> list[Instance]:
                if output_path not in built:
                    built[output_path] = build(output_path)
                return built[output_path]

            scenario.get_instances = get_instances  # type: ignore[method-assign]
            self._scenarios[spec] = scenario
        return self._scenarios[spec]


class _LogFile(io.FileIO):
    """A log whose writes never fail, since they happen in the middle of other people's code.

    Attributes:
        failure: the first that could not be carried out.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.failure = self.failure or error
            return len(data)


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Within it, what HELM and its libraries print or log goes to a file.

    Raises:
        StorageError: if the file cannot be opened, or, where nothing else has failed, written.
    """
    with storage_errors(log):
        raw = _LogFile(log, "a")
    with ExitStack() as stack:
        file = stack.enter_context(io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-8s %(message)s"))
        logger = logging.getLogger("helm")
        before = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(os.environ.get("HELM_LOG_LEVEL", "INFO"))
        logger.propagate = False
        stack.callback(logger.removeHandler, handler)
        stack.enter_context(redirect_stdout(file))
        stack.enter_context(redirect_stderr(file))
        try:
            yield
        finally:
            logger.setLevel(before[0])
            logger.propagate = before[1]
    if raw.failure is not None:
        with storage_errors(log, "write"):
            raise raw.failure
