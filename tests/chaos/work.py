"""The commands that a campaign disturbs, and what of their files has to be the same afterwards."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "scenarios" / "demo" / "model"

_TIMES = re.compile(
    r"time|second|speed|load|peak|created|batch_size|token/s|session|generated_per|engine|free|largest"
    r"|^id$|request_id|crc32"
)
_TIME_STATS = {"inference_runtime", "inference_denoised_runtime", "batch_size"}
_ESCAPE = re.compile(r"\x1b\[|[\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit status; negative where a signal ended it.
        seconds: wall time.
        text: its stderr.
        killed: whether it was ended from here, at the moment asked for.
    """

    code: int
    seconds: float
    text: str
    killed: bool = False

    @property
    def clean(self) -> bool:
        """Whether it did its work, or refused it in one line."""
        said = [line for line in self.text.splitlines() if line.startswith(("error:", "run_helm.py"))]
        refused = self.code in (1, 2) and len(said) == 1 and len(said[0]) < 1000
        return "Traceback" not in self.text and not _ESCAPE.search(self.text) and (self.code == 0 or refused)

    @property
    def last_line(self) -> str:
        """The last line of stderr that is not blank."""
        return next((line for line in reversed(self.text.splitlines()) if line.strip()), "")


@dataclass(frozen=True)
class Command:
    """A command that is disturbed.

    Attributes:
        arguments: of run_helm.py, for a working folder.
        outcome: what the working folder must hold at the end, without times.
        prepare: makes what the command reads, in an empty working folder.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    outcome: Callable[[Path], Any]
    prepare: Callable[[Path], None] = lambda folder: None


def start(
    arguments: list[str], folder: Path, before: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    """Start run_helm.py as a process group of its own; its stderr goes beside the folder."""
    environment = os.environ | {
        "TIERBENCH_STORE": str(folder / "store"),
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
    }
    with _stderr(folder).open("w", encoding="utf-8") as stderr:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run_helm.py"), *arguments],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, text=True,
            start_new_session=True, preexec_fn=before,
        )  # fmt: skip


def _stderr(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.stderr")


def finish(
    process: subprocess.Popen[str], folder: Path, after: float = 300.0, number: int = signal.SIGKILL
) -> Ended:
    """Wait for a process; after ``after`` seconds it is sent the signal ``number``, with all its children."""
    began, killed = time.monotonic(), False
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        killed = True
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Ended(-9, time.monotonic() - began, "hung after the signal", killed)
    text = _stderr(folder).read_text(encoding="utf-8", errors="replace")
    return Ended(process.returncode, time.monotonic() - began, text, killed)


def run(command: Command, folder: Path, after: float = 300.0, number: int = signal.SIGKILL) -> Ended:
    """Run a command in its working folder, to its end or until ``after`` seconds have passed."""
    return finish(start(command.arguments(folder), folder), folder, after, number)


def fresh(command: Command, folder: Path) -> Path:
    """An empty working folder with what the command reads."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command.prepare(folder)
    return folder


def names(folder: Path) -> set[str]:
    """Every file and folder below, by its path."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def equal(got: Any, expected: Any) -> bool:
    """Whether two outcomes are the same; floats within 1e-5, since sums may have another order."""
    if isinstance(expected, float) and isinstance(got, int | float):
        return abs(got - expected) <= 1e-5 + 1e-5 * abs(expected)
    if isinstance(expected, dict) and isinstance(got, dict):
        return got.keys() == expected.keys() and all(equal(got[key], expected[key]) for key in expected)
    if isinstance(expected, list) and isinstance(got, list):
        return len(got) == len(expected) and all(map(equal, got, expected))
    return bool(got == expected)


def without_times(value: Any) -> Any:
    """A JSON value without what is measured anew each time."""
    if isinstance(value, list):
        return [without_times(item) for item in value if not _is_time_stat(item)]
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not _TIMES.search(key)}
    return value


def _is_time_stat(item: Any) -> bool:
    name = item.get("name") if isinstance(item, dict) else None
    return isinstance(name, dict) and name.get("name") in _TIME_STATS


def _json_files(*patterns: str) -> Callable[[Path], Any]:
    def outcome(folder: Path) -> Any:
        paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
        return {
            str(path.relative_to(folder)): without_times(json.loads(path.read_text(encoding="utf-8")))
            for path in paths
        }

    return outcome


def _batch_lines(folder: Path) -> Any:
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["custom_id"]: without_times(line) for line in lines}


def _comparison_rows(folder: Path) -> Any:
    with (folder / "out/comparisons/c/comparison.csv").open(newline="", encoding="utf-8") as file:
        return sorted((row["system"], row["configuration"], row["status"]) for row in csv.DictReader(file))


def _batch_input(folder: Path) -> None:
    def line(number: int) -> dict[str, Any]:
        body = {
            "prompt": f"Question: Is {number} even?\nAnswer:",
            "max_tokens": 4 + number % 9,
            "logprobs": 0,
        }
        return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}

    (folder / "requests.jsonl").write_text("".join(json.dumps(line(n)) + "\n" for n in range(24)))


def _in_folder(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: [word.replace("@", str(folder)) for word in words]


_SUITE = (
    "*/runs/*/*/*stats.json",
    "*/runs/*/*/scenario*.json",
    "*/runs/*/*/run_spec.json",
    "*/runs/*/table.json",
)
_RUN = ("run", "-q", "--suite", "s", "-o", "@/out", "--local-path", "@/prod", "--store", "@/store")

RUN = Command(
    "run",
    _in_folder(*_RUN, "--no-report", "-m", "4", "-r", "form_processing", "information_extraction",
               "--policy", "offloaded,device_batch=2,num_device_batches=2"),
    _json_files(*_SUITE),
)  # fmt: skip
PACKING = Command(
    "packing",
    _in_folder(*_RUN, "--no-report", "-m", "1", "-r", "form_processing",
               "--policy", "offloaded,weight_quant=best4", "offloaded,weight_quant=3"),
    _json_files(*_SUITE),
)  # fmt: skip
REPORT = Command(
    "report",
    _in_folder(*_RUN, "-m", "2", "-r", "form_processing", "--policy", "offloaded"),
    _json_files(*_SUITE),
)
BATCH = Command(
    "batch",
    _in_folder("batch", "--reproducible", "-i", "@/requests.jsonl", "-o", "@/answers.jsonl",
               "--model", str(MODEL), "--policy", "offloaded,device_batch=2,num_device_batches=2",
               "--offload-dir", "@/offload"),
    _batch_lines,
    _batch_input,
)  # fmt: skip
CURVE = Command(
    "curve",
    _in_folder("curve", "--formats", "w4kv4", "-r", "form_processing", "-m", "2", "--answers", "1",
               "--text-tokens", "64",
               "--divergence-tokens", "32", "--window", "64", "--speed-repeats", "1", "--suite", "c",
               "-o", "@/out", "--store", "@/store"),
    _json_files("out/curves/c/helm/runs/*/*/*.json"),
)  # fmt: skip
COMPARE = Command(
    "compare",
    _in_folder("compare", "--model", str(MODEL), "--systems", "ours/full", "ours/4bit", "--prompt-len", "16",
               "--gen-len", "4", "--repeats", "1", "--batch", "2", "--sample", "2", "--output", "c",
               "-o", "@/out"),
    _comparison_rows,
)  # fmt: skip

COMMANDS = {command.name: command for command in (RUN, BATCH, CURVE, COMPARE, PACKING, REPORT)}
