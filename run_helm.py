"""Command-line entry point: ``python run_helm.py --help``. Without arguments it runs the demo."""

import os
import sys


def main() -> int:
    """Run the command that the process's arguments name; returns the exit code."""
    # OpenMP reads this when torch is loaded. Its threads otherwise spin while they wait for each other,
    # which makes small models ten times slower on a machine that has other work too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from harness import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
