"""Command-line entry point: ``python run_helm.py --help``. Without arguments it runs the demo."""

import os
import sys


def main() -> int:
    """Run the command that the process's arguments name; returns the exit code."""
    # OpenMP reads these when torch is loaded. Its threads otherwise spin while they wait for each other,
    # which makes small models ten times slower on a machine that has other work, too. GNU's spins for about
    # as long as it takes to wake a thread: on an idle machine that is up to 1.4 times as fast as none.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from harness import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
