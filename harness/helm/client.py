"""HELM's client for stock ``helm-run``: requests that its threads make at the same time are one batch.

It knows single requests of HELM's and the engine, and nothing of runs or suites. HELM makes the
client by its class name from ``prod_env/model_deployments.yaml``, which `harness.helm.registry` writes.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from helm.clients.client import Client
from helm.common.hierarchical_logger import hwarn
from helm.common.request import Request, RequestResult
from helm.proxy.retry import NonRetriableException

from engine.errors import TierbenchError, first_line
from engine.spec.policy import Policy
from engine.spec.settings import EngineSettings
from harness.engines.protocol import EngineLike
from harness.environment import check_torchvision
from harness.helm.translate import Question, make_question, make_result
from harness.tokenizer import ChatMode, Text

if TYPE_CHECKING:
    from engine.spec import request as asked

GATHER_SECONDS = 0.02
"""A batch is complete when no request came for this long. helm-run's threads make their next request within
a millisecond or two of an answer, and a pass over a model that needs offloading takes far longer."""


@dataclass
class _Call:
    """One thread's call, which waits."""

    request: Request
    result: Future[RequestResult] = field(default_factory=Future)


class Gatherer:
    """Answers calls of many threads in batches, all from one thread of its own.

    Args:
        engine: used by that thread only.
        seed: of sampling.
        chat: whether prompts are put into the tokenizer's chat template.
        gather_seconds: how long no request may come before a batch is complete. The threads wait for their
            answers, so a batch is never larger than their number.
    """

    def __init__(
        self, engine: EngineLike, text: Text, seed: int, gather_seconds: float, chat: bool = False
    ) -> None:
        self._engine, self._text, self._seed, self._chat = engine, text, seed, chat
        self._gather_seconds = gather_seconds
        self._waiting: list[_Call] = []
        self._lock = Lock()
        self._worker = ThreadPoolExecutor(1, "tierbench")

    def ask(self, request: Request) -> RequestResult:
        """Answer a request together with those of other threads.

        Raises:
            TierbenchError: if this request, or the batch it came into, cannot be answered.
        """
        call = _Call(request)
        with self._lock:
            self._waiting.append(call)
        self._worker.submit(self._answer_waiting)  # finds nothing if an earlier batch took this call
        return call.result.result()

    def _answer_waiting(self) -> None:
        calls = self._gather()
        if not calls:
            return
        questions = [(call, question) for call in calls if (question := self._translate(call))]
        requests: dict[str, asked.Request] = {}
        for _, question in questions:
            requests |= zip(question.keys, question.requests, strict=True)
        try:
            outputs = dict(zip(requests, self._engine.answer(list(requests.values())), strict=True))
            for call, question in questions:
                own = [outputs[key] for key in question.keys]
                call.result.set_result(make_result(question, own, self._text))
        except BaseException as error:  # a call without a result would wait forever
            for call in calls:
                if not call.result.done():
                    call.result.set_exception(error)

    def _gather(self) -> list[_Call]:
        seen = 0
        while len(self._waiting) > seen:
            seen = len(self._waiting)
            time.sleep(self._gather_seconds)
        with self._lock:
            calls, self._waiting = self._waiting, []
        return calls

    def _translate(self, call: _Call) -> Question | None:
        """None if the call cannot be answered; the other calls of its batch must not fail with it."""
        try:
            question = make_question(call.request, self._text, self._seed, self._chat)
            if question.requests:
                self._engine.check(question.requests)
        except Exception as error:
            call.result.set_exception(error)
            return None
        return question


@contextmanager
def _without_retries() -> Iterator[None]:
    """HELM tries again five times, waiting 150 seconds in all, unless an error forbids it."""
    try:
        yield
    except TierbenchError as error:
        raise NonRetriableException(str(error)) from error
    except Exception as error:
        raise NonRetriableException(f"{type(error).__name__}: {first_line(error)}") from error


class TierbenchClient(Client):
    """Answers HELM's requests with the engine; all clients of one model and policy in a process share one.

    Args:
        policy: a policy's keys as in a policy file; None is everything on the device.
        gather_seconds: see `Gatherer`.
        apply_chat_template: as of HELM's own client for `transformers`: whether prompts are put into the
            tokenizer's chat template; None where it has one.
        settings: keys of `engine.spec.settings.EngineSettings.to_dict`, of which ``model`` is required.

    Raises:
        NonRetriableException: for a model, policy, device or folder that cannot be used.
    """

    def __init__(
        self,
        model: str,
        policy: Mapping[str, object] | None = None,
        gather_seconds: float = GATHER_SECONDS,
        apply_chat_template: bool | None = None,
        **settings: Any,
    ) -> None:
        mode: ChatMode = "auto" if apply_chat_template is None else "on" if apply_chat_template else "off"
        key = repr((model, policy, gather_seconds, mode, sorted(settings.items())))
        with _without_retries(), _gatherers_lock:  # HELM makes its clients in many threads at the same time
            if key not in _gatherers:
                how = EngineSettings.from_dict({"model": model, **settings})
                _gatherers[key] = _make_gatherer(how, Policy.from_mapping(policy or {}), gather_seconds, mode)
            self._gatherer = _gatherers[key]

    @_without_retries()
    def make_request(self, request: Request) -> RequestResult:
        """Answer one request.

        Raises:
            NonRetriableException: if it cannot be answered; trying again would not help.
        """
        return self._gatherer.ask(request)


_gatherers: dict[str, Gatherer] = {}
_gatherers_lock = Lock()


def _make_gatherer(
    settings: EngineSettings, policy: Policy, gather_seconds: float, mode: ChatMode
) -> Gatherer:
    check_torchvision()
    from engine.engine import Engine

    engine = Engine(settings, policy, hwarn)
    atexit.register(engine.close)
    hwarn(
        f"{settings.model} under policy {policy.name}: a batch holds only the requests of helm-run's threads "
        f"(--num-threads, 4 unless given), the policy's block takes {policy.block_size}. "
        "run_helm.py run asks a whole suite at once and is the fast way"
    )
    text = Text.load(settings.model, settings.trust_remote_code)
    return Gatherer(engine, text, settings.seed, gather_seconds, text.uses_chat(mode))
