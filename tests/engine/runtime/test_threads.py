"""Threads follow the processors that other work leaves free, and answers do not depend on their number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.runtime import threads
from engine.runtime.threads import Threads
from engine.spec.policy import Policy
from engine.spec.request import Request
from tests.support.engine_models import Family, prompts


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(threads, "_INTERVAL", 0.0)
    yield
    torch.set_num_threads(before)


def crowd(monkeypatch: pytest.MonkeyPatch, cores: float | None) -> None:
    """Let other processes keep this many cores busy; None: the system does not say."""
    monkeypatch.setattr(threads.OtherWork, "look", lambda self: cores)


@pytest.mark.parametrize(
    ("others", "expected"), [(0.0, 4), (0.4, 4), (1.1, 3), (2.0, 2), (3.9, 1), (9.0, 1), (None, 4)]
)
def test_others_leave_fewer(
    others: float | None, expected: int, four_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = Threads()
    crowd(monkeypatch, others)
    followed.adjust()
    assert torch.get_num_threads() == expected
    crowd(monkeypatch, 0.0)
    followed.adjust()
    assert torch.get_num_threads() == 4, "as many as at first, once the others are gone"


def test_a_call_leaves_their_number_as_it_was(
    four_threads: None, llama: Family, offload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(prompt, 4, prompt_logprobs=True) for prompt in prompts()[:3]]
    found, seen = [], list[int]()
    for others in (0.0, 3.0):
        crowd(monkeypatch, others)
        seen.clear()
        with Engine(llama.folder, Policy.parse("kv_quant=4"), offload_dir=offload, device="cpu") as engine:
            outputs = engine.answer(requests, on_progress=lambda _: seen.append(torch.get_num_threads()))
        assert set(seen) == {4 - int(others)} and torch.get_num_threads() == 4
        found.append([(output.tokens, output.logprobs, output.prompt_logprobs) for output in outputs])
    assert found[0] == found[1], "bit for bit"
