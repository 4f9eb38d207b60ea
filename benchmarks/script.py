"""Exit codes of a script; a user's error, or Ctrl-C, is one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from engine.errors import TierbenchError
from harness.signals import ending_signals, number_of


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with the code that ``main`` returns; 2 after a `TierbenchError`, 130 or 143 after a signal."""
    try:
        with ending_signals():
            code = main()
    except TierbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as interrupt:
        print("stopped; finished measurements are kept, and the same command continues", file=sys.stderr)
        code = 128 + number_of(interrupt)
    sys.exit(code)
