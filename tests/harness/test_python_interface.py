"""The Python interface: the documented example runs and prints what the document shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from engine import Engine, Output
from harness.commands.run import DEMO_MODEL
from harness.tokenizer import Text

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "ten_lines.py"
DOCUMENT = (ROOT / "docs" / "python.md").read_text()


def test_the_document_shows_the_example_itself() -> None:
    code = EXAMPLE.read_text().split("\n", 2)[2]
    assert f"```python\n{code}```" in DOCUMENT


def test_the_example_prints_what_is_documented() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)  # with a user's number of threads
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    printed = re.search(r"It prints\n\n```\n(.*?)```", DOCUMENT, re.S)
    assert printed is not None
    number = re.compile(r"\d+\.\d+")
    shown, now = printed[1], done.stdout
    assert number.sub("", shown) == number.sub("", now)
    for wanted, got in zip(number.findall(shown), number.findall(now), strict=True):
        assert abs(float(wanted) - float(got)) < 0.05


def test_the_documented_mixed_call_works() -> None:
    found = re.search(r"( +)(outputs = engine\.answer\(.*?\n\1\))", DOCUMENT, re.S)
    assert found is not None
    text = Text.load(str(DEMO_MODEL))
    prompt = text.start_ids + text.encode("Request: The desk is for Paul Weber.\nForm:")
    with Engine(DEMO_MODEL) as engine:
        names = {"engine": engine, "text": text, "prompt": prompt}
        exec("from engine import Request\n" + re.sub(r"(?m)^  ", "", found[2]), names)
    generated, scored = names["outputs"]  # type: ignore[misc]
    assert isinstance(generated, Output) and isinstance(scored, Output)
    assert 0 < len(generated.tokens) <= 20 and len(scored.prompt_logprobs or ()) == len(prompt) - 1
