"""Long batch files: killed and continued, and far longer than what is kept in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from engine.engine import Engine
from engine.spec.policy import Policy
from harness.commands.arguments import POLICY_FILE, read_policies
from harness.openai_batch.job import BatchOptions, batch_identity
from harness.openai_batch.request import read_envelope
from harness.openai_batch.response import record_id
from harness.tokenizer import Text
from tests.harness.openai_batch.batch_files import ROOT, body, line, records, run, write


def test_a_killed_job_goes_on_where_it_stopped(tiny_opt_dir: Path, tmp_path: Path) -> None:
    count = 150
    lines = [
        line(f"{i}", temperature=1, max_tokens=40, prompt=f"Question: Is {i} even?") for i in range(count)
    ]
    source, output = write(tmp_path / "in", lines), tmp_path / "out"
    command = ["batch", "-i", str(source), "-o", str(output), "--model", str(tiny_opt_dir), "--window", "5",
               "--reproducible"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_helm.py"), *command],
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        while not (output.exists() and output.stat().st_size > 7_000):
            assert process.poll() is None, (process.stderr and process.stderr.read(), output.exists())
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = output.read_bytes().rpartition(b"\n")[0].splitlines()
    assert 10 < len(before) < count, "it was killed in the middle"
    with output.open("ab") as file:
        file.write(b'{"id":"batch_req_')  # as if it had been killed during a write
    assert run(tiny_opt_dir, source, output, "--reproducible") == 0
    lines_after = output.read_bytes().splitlines()
    assert lines_after[: len(before)] == before, "what was answered is kept"
    found = records(output)
    assert len(lines_after) == len(found) == count
    assert all(body(found[f"{i}"])["choices"] for i in range(count))
    # a sample of both halves equals what a separate job would have given
    sample = [lines[i] for i in (0, 1, len(before), count - 1)]
    assert run(tiny_opt_dir, write(tmp_path / "few", sample), tmp_path / "alone", "--reproducible") == 0
    assert all(found[name] == record for name, record in records(tmp_path / "alone").items())


def test_memory_does_not_grow_with_the_file(tiny_opt_dir: Path, tmp_path: Path) -> None:
    """Of 60,000 lines, most are answered already or are errors; the model answers the rest."""
    count = 60_000
    source, output = tmp_path / "in", tmp_path / "out"
    policy = Policy.parse("resident", read_policies(POLICY_FILE))
    options = BatchOptions(source, output, policy, [tiny_opt_dir.name])
    with Engine(tiny_opt_dir, policy) as engine:
        fingerprint = batch_identity(engine, Text.load(str(tiny_opt_dir)), options).digest
    with source.open("wb") as asked, output.open("wb") as answered:
        for number in range(count):
            content = line(f"request-{number}", prompt="Is it even or odd? " * 10)
            data = json.dumps(content).encode()
            if number % 5 == 4:
                data = (data[:-1], b"{}", data.replace(b"completions", b"x"))[number % 3]
            elif number % 5000:
                key = read_envelope(data, fingerprint).key
                response = {"status_code": 200, "request_id": "", "body": {"choices": [{"text": "0 " * 400}]}}
                record = {"id": record_id(key), "custom_id": content["custom_id"], "response": response}
                answered.write(json.dumps(record | {"error": None}).encode() + b"\n")
            asked.write(data + b"\n")
    assert source.stat().st_size + output.stat().st_size > 50 << 20
    assert run(tiny_opt_dir, write(tmp_path / "few", [line("a")]), tmp_path / "first") == 0, "all is loaded"
    with MostHeld() as held:
        assert run(tiny_opt_dir, source, output) == 0
    with output.open("rb") as file:
        errors = sum(b'"status_code":4' in one for one in file)
    assert errors == count // 5
    assert held.growth < 24 << 20, f"{held.growth:,} bytes for a file of {source.stat().st_size:,}"


class MostHeld:
    """Measures how much the memory of this process grows inside a block.

    Attributes:
        growth: peak bytes of RAM inside the block minus those at its beginning.
    """

    growth = 0

    def __enter__(self) -> MostHeld:
        self._before, self._over = _held(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.growth = max(self.growth, _held() - self._before)


def _held() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
