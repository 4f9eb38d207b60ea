"""The display of a run: time left, progress by run entry, streams and tiers, with and without a terminal."""

from __future__ import annotations

import io
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.spec.policy import Policy
from engine.spec.request import CallProgress, Output, Request
from harness.progress.dashboard import Dashboard, draw, make_progress
from harness.progress.eta import TimeLeft
from harness.progress.line import Progress, Quiet
from harness.progress.view import View, Watch
from tests.support.tiny_models import save_tiny_opt

ROOT = Path(__file__).resolve().parents[3]


def output(tokens: int) -> Output:
    return Output((1,) * tokens, (0.0,) * tokens, None, "length", 1.0, 1.0)


def walk(
    lengths: Sequence[int], limits: Sequence[int], slots: int
) -> list[tuple[float, float | None, float]]:
    """A refilled block whose passes take 2 s and 10 ms per token; yields time, estimate, passes left."""
    requests = [Request((0,) * 50, limit) for limit in limits]
    left = TimeLeft(requests, slots)
    active = dict.fromkeys(range(min(slots, len(lengths))), 0)
    waiting = list(range(len(active), len(lengths)))
    clock, passes, prompt, generated, said = 0.0, 0, 0, 0, []
    while active:
        computed = sum(1 if done else 50 for done in active.values())
        clock += 2 + 0.01 * computed
        passes += 1
        prompt += sum(50 for done in active.values() if not done)
        generated += len(active)
        for index in list(active):
            active[index] += 1
            if active[index] == lengths[index]:
                del active[index]
                left.finished(index, output(lengths[index]))
                if waiting:
                    active[waiting.pop(0)] = 0
        state = CallProgress(
            0, len(lengths), passes, generated, prompt, clock, 0.0, in_progress=active.copy()
        )
        said.append((clock, left.seconds(state), left.passes_left(state)))
    return said


def test_time_left_accounts_for_refilling_and_passes() -> None:
    generator = random.Random(0)
    lengths = [generator.randint(5, 20) for _ in range(60)]
    said = walk(lengths, [20] * 60, slots=8)
    end = said[-1][0]
    for clock, estimate, _ in said[len(said) // 4 :]:
        assert estimate == pytest.approx(end - clock, rel=0.25, abs=20), "within a quarter after a quarter"
    assert said[-1][1] == 0


def test_the_last_sequence_alone_still_takes_its_passes() -> None:
    """The block empties: fewer tokens are left per pass, but not fewer passes."""
    said = walk([3, 3, 3, 40], [3, 3, 3, 40], slots=4)
    clock, estimate, passes = said[9]
    assert passes == pytest.approx(30, abs=1) and estimate == pytest.approx(said[-1][0] - clock, rel=0.05)


def test_a_look_costs_as_much_as_there_are_slots() -> None:
    """The engine's order is its own: nothing is known of requests that wait but their lengths."""
    read: list[int] = []

    class Counted(dict[int, int]):
        def items(self) -> Any:
            read.append(len(self))
            return super().items()

    estimates = []
    for count in (100, 100_000):
        left = TimeLeft([Request((2,) * 20, 12)] * count, slots=8)
        for index in reversed(range(count // 2)):
            left.finished(index, output(6))
        active = Counted({count - 1 - slot: slot % 3 for slot in range(8)})
        half = count // 2
        state = CallProgress(half, count, 9, 6 * half, 20 * half, 9.0, 0.0, in_progress=active)
        assert left.seconds(state) is not None
        estimates.append(left.passes_left(state) / count)
    assert read == [8] * 4
    assert estimates[0] == pytest.approx(6 / 2 / 8, rel=0.2), "half of the tokens are used, by 8 slots"
    assert estimates[1] == pytest.approx(estimates[0], rel=0.2)


def view(**fields: object) -> View:
    state = CallProgress(3, 10, 7, 20, 300, 4.0, 5.0, busy_seconds={"compute": 3.0}, held={"host": 1 << 20},
                     limits={"host": 4 << 20})  # fmt: skip
    entries = [("[bold]x[/bold]:mode=\x1b[31mred", 1, 4), ("done", 6, 6), ("waits", 0, 5)]
    shown = View(
        "a policy", state, 65.0, 123.4, 80.0, entries, {"compute": 0.75}, [("host", 1 << 20, 4 << 20)]
    )
    return View(**{**vars(shown), **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "height"), [(40, 12), (80, 24), (200, 50)])
def test_picture_fits_the_terminal(width: int, height: int) -> None:
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, height=height, force_terminal=True, color_system=None)
    many = [(f"entry:{index}", index % 3, 3) for index in range(60)]
    for shown in (view(), view(entries=many)):
        console.print(draw(shown, width, height))
        lines = stream.getvalue().splitlines()
        assert len(lines) <= height and max(map(len, lines)) <= width
        text = stream.getvalue()
        stream.seek(0), stream.truncate()
        assert "\x1b[31m" not in text and "stream compute" in text and "tier host" in text
        assert "1:05" in text and "0.75" in text and "1.00 MiB of 4.00 MiB" in text
    assert "more run entries" in text
    console.print(draw(view(), width, height))
    assert "[bold]x[/bold]" in stream.getvalue() or width == 40, "names are not markup"


def test_watch_counts_by_run_entry_and_looks_at_the_last_seconds() -> None:
    requests = [Request((0,) * 10, 4) for _ in range(4)]
    watch = Watch("p", requests, 2, {"a": [0, 1, 2], "b": [2, 3]}, {"a": 5, "b": 0})
    watch.finished(2, output(4))
    first = watch.view(CallProgress(1, 4, 1, 2, 20, 1.0, 9.0, busy_seconds={"compute": 1.0}), now=100.0)
    assert list(first.entries) == [("a", 6, 8), ("b", 1, 2)], "a request of two run entries counts in both"
    later = CallProgress(1, 4, 9, 20, 20, 5.0, 9.0, busy_seconds={"compute": 3.0, "weights": 4.0})
    second = watch.view(later, now=104.0)
    assert second.rate_now == pytest.approx(18 / 4) and second.rate_mean == pytest.approx(40 / 5)
    assert second.streams == pytest.approx({"compute": 0.5, "weights": 1.0})


def test_engine_says_what_lanes_and_tiers_do(tmp_path: Path) -> None:
    seen: list[CallProgress] = []
    policy = Policy.parse("weights=0/0.5/0.5,kv=0/1/0")
    with Engine(save_tiny_opt(tmp_path / "model"), policy, offload_dir=tmp_path / "offload") as engine:
        engine.answer([Request((5, 6, 7), 3)], on_progress=seen.append)
        peak = engine.record().memory
    assert seen[-1].busy_seconds["compute"] > 0 and set(seen[-1].held) == {"device", "host", "disk"}
    for tier, held in seen[-1].held.items():
        assert 0 <= held <= peak[tier].peak <= seen[-1].limits[tier]
    assert seen[-1].held["host"] > 0


def test_without_a_terminal_there_are_plain_lines_and_quiet_says_nothing() -> None:
    stream = io.StringIO()
    progress = make_progress(stream=stream)
    assert type(progress) is Progress
    progress.begin("policy p, requests", 10)
    progress.show(view())
    progress.end()
    assert re.fullmatch(r"policy p, requests: 10 in \d+ ms\n", stream.getvalue())
    said = stream.getvalue()
    quiet = make_progress(quiet=True, stream=stream)
    assert isinstance(quiet, Quiet)
    for _ in range(2):
        quiet.say("something")
        quiet.begin("x", 3)
        quiet.show(view())
        quiet.end()
    assert stream.getvalue() == said


def test_lines_that_stay_are_above_the_picture() -> None:
    from rich.console import Console

    stream = io.StringIO()
    progress = Dashboard(stream, Console(file=stream, width=80, height=24, force_terminal=True))
    progress.begin("policy p, requests", 10)
    progress.show(view())
    progress.say("a [notice]")
    progress.close()
    progress.end("done")
    text = stream.getvalue()
    assert "a [notice]" in text and re.search(r"policy p, requests: 10 in \d+ ms, done\n$", text)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is given back"


def test_interrupted_on_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C while the dashboard is shown: the cursor comes back, and one line says how to continue."""
    pytest.importorskip("helm.benchmark")
    command = [
        sys.executable, str(ROOT / "run_helm.py"), "run", "-r", "key_value_recall", "-m", "60",
        "--suite", "s", "--policy", "name=p,device_batch=1,num_device_batches=1", "-o", str(tmp_path),
        "--no-report", "--local-path", str(tmp_path / "env"),
    ]  # fmt: skip
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "30", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, env=environment) as process:
        os.close(slave)
        shown, began = b"", time.monotonic()
        while b"tier host" not in shown and time.monotonic() - began < 100:
            shown += os.read(master, 65536)
        process.send_signal(signal.SIGINT)
        try:
            while True:
                shown += os.read(master, 65536)
        except OSError:  # the other end is closed
            os.close(master)
    assert process.returncode == 130
    text = shown.decode(errors="replace")
    assert text.count("\x1b[?25h") >= text.count("\x1b[?25l") > 0
    assert "stream compute" in text and "key_value_recall" in text
    assert "run the same command again to continue" in text and "Traceback" not in text
