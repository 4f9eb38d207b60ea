"""Writes batch files, has the real command answer them with a tiny model, and reads the results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness import cli

ROOT = Path(__file__).resolve().parents[3]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if messages[-1]['role'] == 'refused' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{% if mood %}{{ mood }}{% endif %}"
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
    """The one line of an error record, which is where a server has it."""
    assert record["error"] is None and 400 <= record["response"]["status_code"] < 600
    error = record["response"]["body"]["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] and error["code"]
    assert "\n" not in error["message"] and error["message"].startswith("line ")
    return str(error["message"])


def failed(record: dict[str, Any]) -> bool:
    """Whether a record is an error's."""
    return "error" in record["response"]["body"]


def table(reference: Any, ids: Sequence[int]) -> Any:
    """Log-probabilities of every next token after every prefix of the ids, [T, V]."""
    import torch

    with torch.inference_mode():
        return reference(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)


def examples(epilog: str) -> list[list[str]]:
    """The arguments of the commands that a help text shows."""
    lines = epilog.replace("\\\n", " ").splitlines()
    prefix = "run_helm.py "
    return [shlex.split(one.strip().removeprefix(prefix)) for one in lines if one.strip().startswith(prefix)]
