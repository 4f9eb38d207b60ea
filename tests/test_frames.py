"""How many calls of ours lie between the command line and the C kernel, in the demo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from engine.kernels.cpu import attention, native
from harness import cli
from harness.commands.run import DEMO_POLICIES

ROOT = Path(__file__).parents[1]
OURS = {"engine", "harness", "scenarios"}
MOST, MOST_IN_ENGINE = 13, 8


def own_calls() -> list[str]:
    """Files and functions of ours on the stack, the outermost first."""
    calls = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS:
            calls.append(f"{path.relative_to(ROOT)}:{frame.f_code.co_name}")
        frame = frame.f_back
    return calls[::-1]


class Recording:
    """In the place of the compiled library: notes who calls its decoding attention."""

    def __init__(self, library: Any, seen: list[list[str]]) -> None:
        self._library, self._seen = library, seen

    def __getattr__(self, name: str) -> Any:
        function: Callable[..., int] = getattr(self._library, name)
        if name != "decode_sequences":
            return function

        def recorded(*arguments: Any) -> int:
            self._seen.append(own_calls())
            return function(*arguments)

        return recorded


@pytest.mark.skipif(not native.available(), reason="no compiled kernels here")
def test_few_calls_from_the_command_line_to_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run_helm.main` is left out here, since pytest is the program, and counts as one."""
    seen: list[list[str]] = []
    library = attention.library()
    monkeypatch.setattr(attention, "library", lambda: Recording(library, seen))
    code = cli.main([
        "run", "-r", "key_value_recall", "-m", "1", "--policy", *DEMO_POLICIES, "-o", str(tmp_path),
        "--quiet", "--no-report",
    ])  # fmt: skip
    assert code == 0
    assert seen, "the demo decodes in C"
    for calls in seen:
        in_engine = [call for call in calls if call.startswith("engine")]
        assert len(in_engine) <= MOST_IN_ENGINE, "\n".join(in_engine)
        assert 1 + len(calls) <= MOST, calls
