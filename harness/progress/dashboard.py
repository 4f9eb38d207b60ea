"""The live picture of a run on a terminal: run entries, speed, time left, streams, tiers.

It knows rich and views; it does not know how a run goes. Texts from data are shown literally.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TextIO

from engine.units import format_bytes, format_rate, format_seconds
from harness.escape import shortened
from harness.progress.line import Progress
from harness.progress.view import View

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_INTERVAL = 0.25
_FEWEST_LINES = 4


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
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def show(self, view: View) -> None:
        """Draw the view, a few times a second at most."""
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
    """The picture; it fits a terminal of so many columns and lines."""
    from rich.console import Group
    from rich.rule import Rule
    from rich.text import Text

    streams, tiers = _streams(view, width), _tiers(view, width)
    room = max(_FEWEST_LINES, height - len(streams) - len(tiers) - 6)
    lines: list[RenderableType] = [
        Rule(Text(f"policy {shortened(view.policy, width - 20)}"), style="dim"),
        *_entries(view, width, room),
        Text(""),
        *_speed(view),
        *streams,
        *tiers,
    ]
    return Group(*lines)


def _speed(view: View) -> list[RenderableType]:
    from rich.text import Text

    state = view.state
    if state.loaded < 1:
        left = f", {format_seconds(view.eta_seconds)} left" if view.eta_seconds is not None else ""
        return [Text(f"reading weights: {state.loaded:.2f}{left}", overflow="ellipsis", no_wrap=True)]
    now = format_rate(view.rate_now, "token") if view.rate_now else "–"
    mean = format_rate(view.rate_mean, "token") if view.rate_mean else "–"
    left = format_seconds(view.eta_seconds) if view.eta_seconds is not None else "not known yet"
    part = f" + {state.pass_done:.2f}" if state.pass_done < 1 else ""
    text = Text.assemble(
        ("left ", "dim"), (left, "bold"), ("   now ", "dim"), now, ("   mean ", "dim"), mean,
        ("   requests ", "dim"), f"{state.finished:,}/{state.total:,}", ("   passes ", "dim"),
        f"{state.passes:,}{part}",
    )  # fmt: skip
    text.no_wrap, text.overflow = True, "ellipsis"
    return [text]


def _entries(view: View, width: int, room: int) -> list[RenderableType]:
    """Those at work first; what is finished or has to wait is counted where the terminal is too low."""
    from rich.text import Text

    shown = list(view.entries)
    if len(shown) > room:
        at_work = [e for e in shown if 0 < e[1] < e[2]]
        waiting = [e for e in shown if e[1] == 0]
        done = [e for e in shown if e[1] >= e[2]]
        shown = [*at_work, *waiting, *done][: room - 1]
    name = max(12, min(44, width - 42))
    lines: list[RenderableType] = [
        _line(shortened(entry, name), done / total if total else 1.0, f"{done:,}/{total:,}", width, name)
        for entry, done, total in shown
    ]
    if len(shown) < len(view.entries):
        rest = len(view.entries) - len(shown)
        lines.append(Text(f"and {rest} more run entries", style="dim"))
    return lines


def _streams(view: View, width: int) -> list[RenderableType]:
    return [
        _line(f"stream {stream}", share, f"{share:.2f} busy", width, _label(width))
        for stream, share in view.streams.items()
    ]


def _tiers(view: View, width: int) -> list[RenderableType]:
    return [
        _line(
            f"tier {tier}",
            held / limit if limit else 0.0,
            f"{format_bytes(held)} of {format_bytes(limit)}",
            width,
            _label(width),
        )
        for tier, held, limit in view.tiers
    ]


def _label(width: int) -> int:
    """Columns of the names of streams and tiers."""
    return 20 if width >= 60 else 14


def _line(name: str, share: float, figures: str, width: int, name_width: int) -> RenderableType:
    """A name, a bar, figures: on one line, whatever the width."""
    from rich.text import Text

    share = min(1.0, max(0.0, share))
    size = max(0, min(40, width - name_width - len(figures) - 4))
    full = round(share * size)
    text = Text(name.ljust(name_width) + " ", no_wrap=True, overflow="ellipsis")
    text.append("━" * full, style="cyan")
    text.append("─" * (size - full), style="dim")
    text.append(f" {figures}")
    return text
