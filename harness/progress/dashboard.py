"""The live picture of a run on a terminal: run entries, speed, time left, streams, tiers.

It knows rich and views; it does not know how a run goes. Texts from data are shown literally.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from engine.units import format_bytes, format_rate, format_seconds
from harness.escape import plain, shortened
from harness.progress.line import Progress, Quiet
from harness.progress.view import View

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_INTERVAL = 0.25
_FEWEST_LINES = 4


def make_progress(quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """What suits: nothing, a live picture on a terminal, plain lines elsewhere."""
    if quiet:
        return Quiet(stream)
    live = (stream or sys.stderr).isatty() and os.environ.get("TERM") != "dumb"
    return Dashboard(stream) if live else Progress(stream)


class Dashboard(Progress):
    """A `Progress` that shows a whole view while the engine works.

    Lines that stay are printed above it. It is taken away when the step ends.
    """

    def __init__(self, stream: TextIO | None = None, console: Console | None = None) -> None:
        super().__init__(stream)
        from rich.console import Console

        self._console = console or Console(file=self._stream, highlight=False)
        self._picture: Live | None = None
        self._drawn = float("-inf")

    def say(self, message: str) -> None:
        """Write a line that stays."""
        if self._picture is None:
            super().say(message)
        else:
            self._console.print(plain(message), markup=False, highlight=False, soft_wrap=True)

    def show(self, view: View) -> None:
        """Draw the view, at most a few times a second."""
        now = time.monotonic()
        if now - self._drawn < _INTERVAL:
            return
        self._drawn = now
        if self._picture is None:
            from rich.live import Live

            self._erase()
            self._picture = Live(
                console=self._console, auto_refresh=False, transient=True,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._picture.start()
        self._picture.update(draw(view, self._console.width, self._console.height), refresh=True)

    def end(self, detail: str = "") -> None:
        """Finish the step with a line that stays."""
        self.close()
        super().end(detail)

    def close(self) -> None:
        """Take the picture away and give the cursor back, also after an interruption."""
        if self._picture is not None:
            self._picture.stop()
            self._picture = None
            self._drawn = float("-inf")


def draw(view: View, width: int, height: int) -> RenderableType:
    """The picture; it fits a terminal of this width and height in characters."""
    from rich.console import Group
    from rich.rule import Rule
    from rich.text import Text

    streams = [(f"stream {name}", share, f"{share:.2f} busy") for name, share in view.streams.items()]
    tiers = [
        (f"tier {tier}", used / limit if limit else 0.0, f"{format_bytes(used)} of {format_bytes(limit)}")
        for tier, used, limit in view.tiers
    ]
    shown = _at_work(view, max(_FEWEST_LINES, height - len(streams) - len(tiers) - 6))
    left_out = len(view.entries) - len(shown)
    name = max(12, min(44, width - 42))
    entries = [
        (shortened(entry, name), done / total if total else 1.0, f"{done:,}/{total:,}")
        for entry, done, total in shown
    ]
    return Group(
        Rule(Text(f"policy {shortened(view.policy, width - 20)}"), style="dim"),
        _bars(entries),
        *([Text(f"and {left_out} more run entries", style="dim")] if left_out else []),
        Text(""),
        Text.assemble(*_speed(view), no_wrap=True, overflow="ellipsis"),
        _bars([*streams, *tiers]),
    )


def _speed(view: View) -> list[str | tuple[str, str]]:
    state, eta = view.state, view.eta_seconds
    if state.loaded < 1:
        left = f", {format_seconds(eta)} left" if eta is not None else ""
        return [f"reading weights: {state.loaded:.2f}{left}"]
    part = f" + {state.pass_done:.2f}" if state.pass_done < 1 else ""
    return [
        ("left ", "dim"), (format_seconds(eta) if eta is not None else "not known yet", "bold"),
        ("   now ", "dim"), format_rate(view.rate_now, "token") if view.rate_now else "–",
        ("   mean ", "dim"), format_rate(view.rate_mean, "token") if view.rate_mean else "–",
        ("   requests ", "dim"), f"{state.finished:,}/{state.total:,}",
        ("   passes ", "dim"), f"{state.passes:,}{part}",
    ]  # fmt: skip


def _at_work(view: View, lines: int) -> list[tuple[str, int, int]]:
    """All run entries, or where they are too many those at work, then waiting, then finished."""
    if len(view.entries) <= lines:
        return list(view.entries)
    return sorted(view.entries, key=lambda e: 2 if e[1] >= e[2] else 1 if e[1] == 0 else 0)[: lines - 1]


def _bars(rows: Iterable[tuple[str, float, str]]) -> RenderableType:
    """Name, bar and figures, one line each; a narrow terminal shortens the bars."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(max_width=40)
    grid.add_column(no_wrap=True)
    for name, share, figures in rows:
        grid.add_row(Text(name), ProgressBar(total=1.0, completed=min(1.0, max(0.0, share))), Text(figures))
    return grid
