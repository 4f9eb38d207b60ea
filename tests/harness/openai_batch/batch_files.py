"""Writes batch files, has the real command answer them with a tiny model, and reads the results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import cli

ROOT = Path(__file__).resolve().parents[3]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if messages[-1]['role'] == 'refused' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def line(custom_id: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    """One line of a batch file: a request that is greedy and short by default."""
    if url == COMPLETIONS:
        body = {"prompt": "Question: Is 24 even or odd?", "max_tokens": 4} | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"temperature": 0} | body}


def write(path: Path, lines: Iterable[dict[str, Any] | bytes]) -> Path:
    """Write a file of requests; lines given as bytes are written unchanged."""
    path.write_bytes(
        b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in lines)
    )
    return path


def run(model: Path, source: Path, output: Path, *more: str) -> int:
    """The command, in this process."""
    return cli.main(["batch", "-i", str(source), "-o", str(output), "--model", str(model), *more])


def records(path: Path) -> dict[str | None, dict[str, Any]]:
    """The records of a result file by custom id; of those without an id, only the last."""
    return {record["custom_id"]: record for record in map(json.loads, path.read_bytes().splitlines())}


def body(record: dict[str, Any]) -> dict[str, Any]:
    """The answer in a record that has one."""
    assert record["error"] is None and record["response"]["status_code"] == 200, record
    return dict(record["response"]["body"])


def message(record: dict[str, Any]) -> str:
    """The one line of an error record, which says the same in both its places."""
    error, answer = record["error"], record["response"]
    assert 400 <= answer["status_code"] < 500
    assert (
        answer["body"]["error"]["message"] == error["message"]
        and answer["body"]["error"]["code"] == error["code"]
    )
    assert "\n" not in error["message"] and error["message"].startswith("line ")
    return str(error["message"])


def examples(epilog: str) -> list[list[str]]:
    """The arguments of the commands that a help text shows."""
    lines = epilog.replace("\\\n", " ").splitlines()
    prefix = "run_helm.py "
    return [shlex.split(one.strip().removeprefix(prefix)) for one in lines if one.strip().startswith(prefix)]
