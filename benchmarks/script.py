"""Exit codes of a script; a user's error, or Ctrl-C, is one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from engine.errors import TierbenchError


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with the code that ``main`` returns; 2 after a `TierbenchError`, 130 after Ctrl-C."""
    try:
        code = main()
    except TierbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped; finished measurements are kept, and the same command continues", file=sys.stderr)
        code = 130
    sys.exit(code)
