"""The child's side: reads requests as JSON lines, passes them to one system, answers in JSON lines.

    python serve.py MODULE CLASS

Requests: ``{"id", "do": "hello" | "prepare" | "load" | "generate" | "score" | "end", ...}``. An answer holds
the id and ``ok``; if that is false, also ``error`` and ``reason``: unsupported, refused or failed. What the
system itself prints goes to standard error, so that it cannot be mistaken for an answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG

ROOT = Path(__file__).resolve().parents[3]


def main(module: str, name: str) -> int:
    """Serve until the input ends; returns the exit code."""
    with contextlib.suppress(OSError, AttributeError):  # a killed parent cannot end a child that is computing
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # prints of libraries, C included
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # last: the environment's own packages come first
    serve(getattr(importlib.import_module(module), name)(), sys.stdin, answers)
    return 0


def serve(baseline: Any, requests: TextIO, answers: TextIO) -> None:
    """Answer every request of a stream, up to and including ``end``."""
    from harness.baselines.base import Refused, Unsupported

    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any] = {"id": request["id"], "ok": True}
        try:
            answer |= _do(baseline, request)
        except (Unsupported, NotImplementedError) as error:
            answer |= {"ok": False, "reason": "unsupported", "error": str(error)}
        except Refused as error:
            answer |= {"ok": False, "reason": "refused", "error": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer |= {"ok": False, "reason": "failed", "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
        if request["do"] == "end":
            return


def _do(baseline: Any, request: dict[str, Any]) -> dict[str, Any]:
    from harness.baselines.base import Job, anonymous_bytes

    what = request["do"]
    if what == "hello":
        return {"versions": baseline.versions(), "python": sys.version.split()[0]}
    if what == "prepare":
        return {"prepared": baseline.prepare(Job(**request["job"]))}
    if what == "load":
        return {"loaded": baseline.load(Job(**request["job"]))}
    if what == "generate":
        result = vars(baseline.generate(request["prompts"], request["new_tokens"]))
        return {**result, "anonymous_bytes": anonymous_bytes(), "device_peak_bytes": baseline.device_peak()}
    if what == "score":
        return {"logprobs": baseline.score(request["sequences"])}
    if what == "end":
        return {}
    raise ValueError(f"unknown request {what!r}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
