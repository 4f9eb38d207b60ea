"""A calibration run: the user's own prompts through the model, statistics of its activations into a file."""

from __future__ import annotations

import json
from pathlib import Path

from engine.engine import Engine
from engine.errors import UsageError
from engine.spec.policy import Policy
from engine.spec.request import Request
from engine.spec.settings import EngineSettings
from harness.progress.line import Progress
from harness.tokenizer import Text

FIELDS = ("prompt", "text")
"""Keys of a JSON line that may hold the prompt."""


def read_prompts(path: Path, most: int) -> list[str]:
    """The prompts of a file: one a line, or of a ``.jsonl`` file one object a line with prompt or text.

    Raises:
        UsageError: if the file cannot be read, holds no prompt, or a line is not what it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"the prompts {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the prompts {path} are not text in UTF-8") from None
    prompts: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and len(prompts) < most:
            prompts.append(_prompt(path, number, line) if path.suffix == ".jsonl" else line)
    if not prompts:
        raise UsageError(f"the prompts {path} hold no text: write one prompt a line")
    return prompts


def prompt_requests(settings: EngineSettings, text: Text, prompts: list[str], length: int) -> list[Request]:
    """The prompts as requests of one token each, cut to ``length`` tokens and to the model's window.

    Raises:
        UsageError: if no prompt has a token, or the model cannot be used.
    """
    with Engine(settings) as engine:
        most = min(length, engine.spec.max_positions or length)
    requests = [Request(ids, 1) for prompt in prompts if (ids := tuple(text.encode(prompt)[:most]))]
    if not requests:
        raise UsageError("the prompts have no token: write text")
    return requests


def calibrate(settings: EngineSettings, policy: Policy, requests: list[Request], path: Path) -> int:
    """Run the prompts under a policy and write the statistics; returns the tokens seen.

    Raises:
        UsageError: if the file cannot be written.
    """
    progress = Progress()
    with Engine(settings, policy, progress.say) as engine:
        progress.begin("calibration", len(requests))
        try:
            tokens = engine.calibrate(
                [request.prompt for request in requests],
                path,
                lambda state: progress.update(state.finished, eta_seconds=state.eta_seconds),
            )
        except OSError as error:
            raise UsageError(f"the statistics {path} cannot be written: {error.strerror}") from error
        progress.end(f"{tokens:,} tokens")
    return tokens


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UsageError(f"line {number} of {path} is not JSON: {error}") from None
    found = next((record[key] for key in FIELDS if isinstance(record, dict) and key in record), None)
    if not isinstance(found, str):
        raise UsageError(f"line {number} of {path} has no text under {' or '.join(FIELDS)}")
    return found
