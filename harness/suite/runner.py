"""Runs a suite: many run entries, one model, one or more policies, each with one call to the engine.

It knows the order of the steps; each step is another module's work. In order: describe the model, build
all requests, create all metrics, check every policy's memory, and only then load weights; per policy
answer what the journal lacks, let HELM score the runs and write their files; at the end the table.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import PolicyError, UsageError, storage_errors
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord
from engine.spec.request import Output, Request
from engine.spec.request import Progress as EngineProgress
from harness.engines.auto import AutoEngine, is_auto, predicted_table
from harness.engines.protocol import EngineFactory, EngineLike
from harness.environment import check_torchvision, require_helm
from harness.files import SuiteStore, write_atomically, write_json
from harness.helm.registry import make_deployment, register, slug, write_prod_env
from harness.helm.translate import make_result
from harness.progress.line import make_progress
from harness.progress.view import Watch
from harness.suite.bounds import with_bounds
from harness.suite.gate import check_accepted
from harness.suite.journal import Answer, Journal
from harness.suite.manifest import (
    Manifest,
    answer_identity,
    make_manifest,
    package_version,
    read_manifest,
    unfinished,
)
from harness.suite.options import SuiteOptions
from harness.suite.policy_run import PolicyPart, dry_run_text
from harness.suite.requests import AskedRun, ask, different_requests, request_identity
from harness.suite.score import read_score
from harness.suite.table import Row, SuiteTable, make_row, to_markdown
from harness.tokenizer import Text

if TYPE_CHECKING:
    from helm.common import request as helm

    from harness.helm.bridge import SuiteRunner
    from harness.helm.entries import SuiteRun

_RECORD_SECONDS = 1.0
"""How often the manifest is written while the engine works."""


@dataclass(frozen=True)
class SuiteResult:
    """What a suite leaves behind."""

    folder: Path
    """Of the suite's runs, policies and table."""

    reports: Path
    """Where its report belongs."""

    rows: Sequence[Row]
    """The table's rows, without runs that could not be scored; none after a dry run."""

    shown: str
    """What is printed: the table, or a dry run's account."""

    failures: Sequence[str] = ()
    """One line per run that could not be scored; its answers are in the journal."""


def run_suite(options: SuiteOptions, engine_factory: EngineFactory | None = None) -> SuiteResult:
    """Run a suite, or with ``dry_run`` only say what it would ask and hold.

    Args:
        engine_factory: makes the engine; None takes `engine.engine.Engine`.

    Raises:
        TierbenchError: for every error that a user can cause.
    """
    names = [slug(policy.name) for policy in options.policies]
    if len(set(names)) < len(names):
        raise PolicyError(f"two policies have one name among {', '.join(names)}: name them with name=...")
    check_torchvision()
    require_helm()
    store = SuiteStore(options.output_path, options.suite)
    with ExitStack() as stack:
        stack.enter_context(store.locked())
        stack.callback(store.clear_staging)
        return _Suite(options, store, engine_factory, stack).run()


class _Suite:
    """The steps of `run_suite`, and what they hand to each other."""

    runner: SuiteRunner
    asked: list[AskedRun]

    def __init__(
        self, options: SuiteOptions, store: SuiteStore, factory: EngineFactory | None, stack: ExitStack
    ) -> None:
        self.options, self.store, self.progress = options, store, make_progress(options.quiet)
        stack.callback(self.progress.close)
        self.failures: dict[str, str] = {}  # by run name
        engines = [self._make_engine(policy, factory, stack) for policy in options.policies]
        self.text = Text.load(options.settings.model, options.settings.trust_remote_code)
        pairs = zip(options.policies, engines, strict=True)
        self.parts = [self._make_part(policy, engine, stack) for policy, engine in pairs]

    def run(self) -> SuiteResult:
        self._prepare()
        requests = different_requests(self.asked)
        for part in self.parts:
            self._settle(part, requests)
        if self.options.dry_run:
            return SuiteResult(
                self.store.folder, self.store.reports, [], dry_run_text(self.asked, self.parts, requests)
            )
        for part in self.parts:
            for line in part.kept(requests):
                self.progress.say(line)
            part.refuse(requests)
        rows: list[Row] = []
        peaks: dict[str, dict[str, int]] = {}
        records = {}
        for part in self.parts:
            manifest = self._answer(part, part.missing(requests))
            self._score(part, manifest)
            rows += self._rows(part)
            peaks[part.policy.name] = manifest.peak_bytes
            records[part.policy.name] = manifest.engine
        shown = to_markdown(rows, peaks) + predicted_table(records)
        write_json(self.store.folder / "table.json", SuiteTable(self.options.suite, rows, peaks).to_json())
        write_atomically(self.store.folder / "table.md", shown)
        return SuiteResult(self.store.folder, self.store.reports, rows, shown, list(self.failures.values()))

    def _make_engine(self, policy: Policy, factory: EngineFactory | None, stack: ExitStack) -> EngineLike:
        if factory is None:
            from engine.engine import Engine

            factory = Engine
        made_by, settings = factory, self.options.settings

        def make(policy: Policy) -> EngineLike:
            return made_by(settings, policy, self.progress.say)

        engine = make(policy)
        if is_auto(policy):
            engine = AutoEngine(make, policy, settings, say=self.progress.say, first=engine)
        stack.callback(engine.close)
        if self.options.only_accepted is not None:
            check_accepted(policy, self.options.only_accepted, engine.spec.digest)
        return engine

    def _settle(self, part: PolicyPart, requests: Mapping[str, Request]) -> None:
        """Find the policy that is to be found, or go on with the one that some answers were given with."""
        if not isinstance(part.engine, AutoEngine):
            return
        before = read_manifest(part.folder / "manifest.json")
        part.policy = part.engine.settle(list(requests.values()), before.engine if before else None)
        part.identity = self._identity(part.engine, part.policy)

    def _identity(self, engine: EngineLike, policy: Policy) -> str:
        device, settings = engine.record().hardware.device, self.options.settings
        return answer_identity(engine.spec.digest, settings.weights, policy, device, settings.seed)

    def _make_part(self, policy: Policy, engine: EngineLike, stack: ExitStack) -> PolicyPart:
        options = self.options
        folder = self.store.policy(slug(policy.name))
        return PolicyPart(
            policy=policy,
            engine=engine,
            deployment=make_deployment(
                options.settings, policy, engine.spec, options.model_name, self.text,
                options.forbid_truncation,
            ),
            identity=self._identity(engine, policy),
            folder=folder,
            journal=stack.enter_context(Journal(folder / "journal.jsonl")),
        )  # fmt: skip

    def _prepare(self) -> None:
        """Build all requests and create all metrics; nothing is asked yet."""
        options, progress = self.options, self.progress
        progress.say("loading HELM and its scenarios")
        from harness.helm.bridge import SuiteRunner, quiet
        from harness.helm.entries import import_plugins, make_runs, read_entries

        with quiet(self.store.log):
            register([part.deployment for part in self.parts])
            import_plugins(options.plugins)
            self.runner = SuiteRunner(self.store, options.local_path)
            entries = read_entries(options.run_entries, options.conf_paths)
            for part in self.parts:
                name = part.deployment.name
                part.runs = make_runs(entries, name, options.max_eval_instances, options.num_train_trials)
            runs = self.parts[0].runs
            self.runner.create_metrics(runs)
            self.asked = []
            progress.begin("building requests, run entries", len(runs))
            for run in runs:
                progress.update(len(self.asked), run.entry)
                self.asked.append(ask(run, self.runner.record(run), self.text, options.settings.seed))
            states, different = sum(run.states for run in self.asked), len(different_requests(self.asked))
            progress.end(f"{states:,} requests, {different:,} different")
        if not options.dry_run:
            write_prod_env(options.local_path, [part.deployment for part in self.parts])

    def _answer(self, part: PolicyPart, missing: Mapping[str, Request]) -> Manifest:
        """Have the missing requests answered in one call; returns the manifest, which is written too."""
        before = read_manifest(part.folder / "manifest.json")

        def write(record: EngineRecord) -> Manifest:
            manifest = make_manifest(
                suite=self.options.suite,
                policy=part.policy.name,
                identity=part.identity,
                run_entries=[run.entry for run in self.asked],
                seed=self.options.settings.seed,
                record=record,
            ).continuing(before, ran=bool(missing))
            write_json(part.folder / "manifest.json", manifest.to_json())
            return manifest

        if missing:
            keys, requests = [part.key(key) for key in missing], list(missing.values())
            written, passes = float("-inf"), 0
            watch = self._watch(part, missing)

            def on_output(index: int, output: Output) -> None:
                watch.finished(index, output)
                part.journal.add(keys[index], Answer(output, len(requests[index].prompt)))

            def on_progress(state: EngineProgress) -> None:
                nonlocal written, passes
                is_first = state.passes > 0 and not passes
                if is_first or time.monotonic() - written > _RECORD_SECONDS:
                    write(unfinished(part.engine.record(), state))  # what a killed process leaves behind
                    written, passes = time.monotonic(), state.passes
                self.progress.show(watch.view(state))

            self.progress.say(f"policy {part.policy.name}: answering {len(requests):,} requests")
            self.progress.begin(f"policy {part.policy.name}, requests", len(requests))
            outputs = part.engine.answer(requests, on_output=on_output, on_progress=on_progress)
            self.progress.end()
            part.journal.close()
            with storage_errors(part.folder / "trace.json"):
                part.engine.trace.write_chrome(part.folder / "trace.json")
        record = part.engine.record()
        if missing:
            record = with_bounds(record, part.engine, requests, outputs, self.options.settings.device)
        manifest = write(record)
        part.engine.close()  # its weights go before the next policy's come
        return manifest

    def _watch(self, part: PolicyPart, missing: Mapping[str, Request]) -> Watch:
        """Looks at the call that answers what is missing, by run entry."""
        places = {key: place for place, key in enumerate(missing)}
        entries: dict[str, list[int]] = {}
        answered: dict[str, int] = {}
        for run in self.asked:
            keys = run.requests()
            entries.setdefault(run.entry, []).extend(places[key] for key in keys if key in places)
            answered[run.entry] = answered.get(run.entry, 0) + sum(key not in places for key in keys)
        slots = part.policy.device_batch * part.policy.num_device_batches
        return Watch(part.policy.name, list(missing.values()), slots, entries, answered)

    def _score(self, part: PolicyPart, manifest: Manifest) -> None:
        """Let HELM score the runs and write their files, save those that already are what they would be.

        A run that cannot be scored is noted and the suite goes on: other policies' answers may take hours.
        """
        from harness.helm.bridge import quiet

        pairs = list(zip(part.runs, self.asked, strict=True))
        wanted = {run.spec.name: self._digest(run, asked) for run, asked in pairs}
        done = {name for name, digest in manifest.runs.items() if digest == wanted.get(name)}
        done = {name for name in done if self.store.is_complete(name)}
        todo = [(run, asked) for run, asked in pairs if run.spec.name not in done]
        if todo:
            self.progress.begin(f"policy {part.policy.name}, scoring run entries", len(todo))
        for count, (run, asked) in enumerate(todo):
            self.progress.update(count, run.entry)
            if failure := part.failure(asked):
                self.failures[run.spec.name] = failure
                continue

            def answer(request: helm.Request, asked: AskedRun = asked) -> helm.RequestResult:
                question = asked.questions[request_identity(request)]
                outputs = [part.journal.answers[part.key(key)].output for key in question.keys]
                return make_result(question, outputs, self.text)

            try:
                with quiet(self.store.log):
                    self.runner.replay(run, answer)
            except UsageError as error:
                self.failures[run.spec.name] = str(error)
                continue
            manifest = manifest.with_run(run.spec.name, wanted[run.spec.name])
            write_json(part.folder / "manifest.json", manifest.to_json())
        if todo:
            self.progress.end()

    def _rows(self, part: PolicyPart) -> list[Row]:
        return [
            make_row(
                run_entry=run.entry,
                run_name=run.spec.name,
                policy=part.policy.name,
                model=self.options.model_name,
                score=read_score(self.store.run(run.spec.name)),
                answers=[part.journal.answers[part.key(key)] for key in asked.requests()],
            )
            for run, asked in zip(part.runs, self.asked, strict=True)
            if run.spec.name not in self.failures
        ]

    def _digest(self, run: SuiteRun, asked: AskedRun) -> str:
        """Identifies what a run's folder holds: if it is the same, HELM would write the same files."""
        content = (asked.digest, run.spec, sorted(asked.requests()), package_version("crfm-helm"))
        return hashlib.sha256(repr(content).encode()).hexdigest()
