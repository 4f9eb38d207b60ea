"""A calibration run: the user's own prompts through the model, statistics of its activations into a file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from engine.engine import Engine
from engine.errors import UsageError
from engine.spec.policy import Policy
from engine.spec.request import Request
from engine.spec.settings import EngineSettings
from harness.progress.line import Progress
from harness.sweep.texts import json_texts, read_file
from harness.tokenizer import Text

FIELDS = ("prompt", "text")
"""Keys of a JSON line that may hold the prompt."""


def read_prompts(path: Path, most: int) -> list[str]:
    """The prompts of a file: one a line, or of a ``.jsonl`` file one object a line with prompt or text.

    Raises:
        UsageError: if the file cannot be read, holds no prompt, or a line is not what it should be.
    """
    content = read_file(path, "file of prompts")
    found = json_texts(path, content, FIELDS) if path.suffix == ".jsonl" else content.splitlines()
    prompts = list(islice(filter(str.strip, found), most))
    if not prompts:
        raise UsageError(f"the prompts {path} hold no text: write one prompt a line")
    return prompts


def prompt_requests(settings: EngineSettings, text: Text, prompts: list[str], length: int) -> list[Request]:
    """The prompts as requests of one token each, cut to ``length`` tokens and to the model's window.

    Raises:
        UsageError: if no prompt has a token, or the model cannot be used.
    """
    with Engine(settings, on_notice=Progress().say) as engine:
        most = min(length, engine.spec.max_positions or length)
    requests = [Request(ids, 1) for prompt in prompts if (ids := tuple(text.encode(prompt)[:most]))]
    if not requests:
        raise UsageError("the prompts have no token: write text")
    return requests


def calibrate(settings: EngineSettings, policy: Policy, requests: list[Request], path: Path) -> int:
    """Run the prompts under a policy and write the statistics; returns the tokens seen.

    Raises:
        StorageError: if the file cannot be written.
    """
    progress = Progress()
    with Engine(settings, policy, progress.say) as engine:
        progress.begin("calibration", len(requests))
        tokens = engine.calibrate(
            [request.prompt for request in requests],
            path,
            lambda state: progress.update(state.finished, eta_seconds=state.eta_seconds),
        )
        progress.end(f"{tokens:,} tokens")
    return tokens
