"""How a script ends: what a user did wrong, or Ctrl-C, in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from engine.errors import TierbenchError


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with what ``main`` returns; 2 after an error that has a message for users, 130 after Ctrl-C."""
    try:
        code = main()
    except TierbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped; what is measured is kept, and the same command goes on", file=sys.stderr)
        code = 130
    sys.exit(code)
