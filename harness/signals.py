"""Signals that ask a command to end: each unwinds it as Ctrl-C does, so that temporary files go.

It knows signals and exit codes; what is to be cleaned up is known where it was made.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What batch systems, containers and closed terminals send; Python itself turns SIGINT into an exception."""

_PATIENCE = 10.0
"""Seconds in which a signal is not repeated, so that an impatient sender does not interrupt the cleaning."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The signal behind an interruption."""
    return interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT


@contextmanager
def ending_signals() -> Iterator[None]:
    """Within it the signals raise `Terminated` in the main thread.

    Those that are ignored (as under ``nohup``) or handled by somebody else stay as they are.
    """
    last = float("-inf")

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last < _PATIENCE:
            return
        last = time.monotonic()
        raise Terminated(number)

    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
