"""What a suite asks: the requests of all its runs, translated once and free of repeats.

It knows HELM's request states and the engine's requests; not how they are answered or stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.spec.request import Request
from harness.helm.translate import Question, make_question
from harness.tokenizer import Text

if TYPE_CHECKING:
    from helm.benchmark.adaptation.request_state import RequestState
    from helm.common import request as helm

    from harness.helm.entries import SuiteRun


@dataclass(frozen=True)
class AskedRun:
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


def ask(run: SuiteRun, states: Sequence[RequestState], text: Text, seed: int) -> AskedRun:
    """Translate the recorded requests of a run.

    Raises:
        RequestError: for a request that a text model cannot be asked.
    """
    questions: dict[str, Question] = {}
    digest = hashlib.sha256(repr(run.spec.metric_specs).encode())
    for state in states:
        identity = request_identity(state.request)
        if identity not in questions:
            questions[identity] = make_question(state.request, text, seed)
        digest.update(repr((state.instance, state.reference_index, state.output_mapping, identity)).encode())
    instances = len({(state.instance.id, state.instance.perturbation) for state in states})
    return AskedRun(run.entry, instances, len(states), questions, digest.hexdigest())


def request_identity(request: helm.Request) -> str:
    """Identifies a HELM request apart from the deployment it is meant for."""
    return hashlib.sha256(repr(replace(request, model="", model_deployment="")).encode()).hexdigest()


def different_requests(runs: Iterable[AskedRun]) -> dict[str, Request]:
    """The engine's requests of many runs by key, each once, in the order of the runs."""
    merged: dict[str, Request] = {}
    for run in runs:
        merged |= run.requests()
    return merged
