"""What a suite asks: the requests of all its run entries, translated once and free of repeats.

It knows HELM's request states and the engine's requests; not how they are answered or stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from engine.errors import RequestError
from engine.spec.policy import Policy
from engine.spec.request import Request
from harness.environment import require_memory_for
from harness.helm.registry import Deployment, make_deployment, register
from harness.helm.translate import Question, make_question
from harness.suite.options import Suite, SuiteOptions, open_suite
from harness.tokenizer import Text

if TYPE_CHECKING:
    from helm.benchmark.adaptation.request_state import RequestState
    from helm.common import request as helm

    from harness.helm.bridge import SuiteRunner
    from harness.helm.entries import SuiteRun


@dataclass(frozen=True)
class RunRequests:
    """The requests of one run; they are the same under every policy."""

    entry: str
    instances: int
    """Different evaluation instances."""

    states: int
    """HELM's requests: per instance one per reference, train trial and the like."""

    questions: Mapping[str, Question]
    """Translated requests by `request_identity`."""

    digest: str
    """Identifies instances, references and requests: what is asked and how it will be scored."""

    def requests(self) -> dict[str, Request]:
        """The engine's requests by their keys."""
        return {
            key: request
            for question in self.questions.values()
            for key, request in zip(question.keys, question.requests, strict=True)
        }


@dataclass(frozen=True)
class SuiteRequests:
    """The requests of all runs, and HELM's runner, which scores their answers."""

    helm: SuiteRunner

    runs: Mapping[str, Sequence[SuiteRun]]
    """HELM's runs by deployment, in the order of ``asked``."""

    asked: Sequence[RunRequests]

    @cached_property
    def different(self) -> dict[str, Request]:
        """The engine's requests by key, each once, in the order of the runs."""
        merged: dict[str, Request] = {}
        for run in self.asked:
            merged |= run.requests()
        return merged

    @property
    def prompts(self) -> str:
        """How prompts are asked, in one line."""
        questions = [question for run in self.asked for question in run.questions.values()]
        inside = sum(question.templated for question in questions)
        if not inside:
            return "chat: off, prompts are asked as they are"
        bare = len(questions) - inside
        rest = f"; {bare:,} that are scored are asked as they are" if bare else ""
        return f"chat: on, {inside:,} prompts are put into the tokenizer's chat template{rest}"


def build_requests(suite: Suite, deployments: Sequence[Deployment]) -> SuiteRequests:
    """Have HELM build the requests of all run entries and create all metrics; nothing is asked yet.

    Args:
        deployments: of the policies; the requests are built once, for the first.

    Raises:
        UsageError: for a run entry, plugin or metric that cannot be used.
        RequestError: for a request that a text model cannot answer.
    """
    options, progress = suite.options, suite.progress
    progress.say("loading HELM and its scenarios")
    require_memory_for("helm.benchmark")
    from harness.helm.bridge import SuiteRunner, quiet
    from harness.helm.entries import import_plugins, make_runs, read_entries

    with quiet(suite.store.log):
        register(deployments)
        import_plugins(options.plugins)
        helm = SuiteRunner(suite.store, options.local_path)
        entries = read_entries(options.run_entries, options.conf_paths)
        runs = {
            one.name: make_runs(entries, one.name, options.max_eval_instances, options.num_train_trials)
            for one in deployments
        }
        first = runs[deployments[0].name]
        helm.create_metrics(first)
        asked: list[RunRequests] = []
        progress.begin("building requests, run entries", len(first))
        for run in first:
            progress.update(len(asked), run.entry)
            states = helm.record(run)
            asked.append(translate(run, states, suite.text, options.settings.seed, suite.chat))
        requests = SuiteRequests(helm, runs, asked)
        total = sum(run.states for run in asked)
        progress.end(f"{total:,} requests, {len(requests.different):,} different")
        if suite.chat:
            progress.say(requests.prompts)
    return requests


def requests_of(options: SuiteOptions) -> list[Request]:
    """The different requests of a suite's run entries, without an engine that could answer them.

    Raises:
        TierbenchError: as `build_requests`, and for a model that cannot be used.
    """
    from engine.engine import Engine

    with open_suite(options) as suite:
        with Engine(options.settings, on_notice=suite.progress.say) as engine:
            spec = engine.spec
        deployment = make_deployment(
            options.settings, Policy(), spec, options.model_name, suite.text, options.forbid_truncation,
            suite.chat,
        )  # fmt: skip
        return list(build_requests(suite, [deployment]).different.values())


def translate(
    run: SuiteRun, states: Sequence[RequestState], text: Text, seed: int, chat: bool
) -> RunRequests:
    """Translate the recorded requests of a run.

    Args:
        chat: whether prompts are put into the tokenizer's chat template.

    Raises:
        RequestError: for a request that a text model cannot be asked; it names the run entry.
    """
    questions: dict[str, Question] = {}
    digest = hashlib.sha256(repr(run.spec.metric_specs).encode())
    for state in states:
        identity = request_identity(state.request)
        if identity not in questions:
            try:
                questions[identity] = make_question(state.request, text, seed, chat)
            except RequestError as error:
                raise RequestError(f"run entry {run.entry!r}: {error}") from error
        digest.update(repr((state.instance, state.reference_index, state.output_mapping, identity)).encode())
    instances = len({(state.instance.id, state.instance.perturbation) for state in states})
    return RunRequests(run.entry, instances, len(states), questions, digest.hexdigest())


def request_identity(request: helm.Request) -> str:
    """Identifies a HELM request apart from the deployment it is meant for."""
    return hashlib.sha256(repr(replace(request, model="", model_deployment="")).encode()).hexdigest()
