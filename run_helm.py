"""Command-line entry point: ``python run_helm.py --help``. Without arguments it runs the demo."""

import sys


def main() -> int:
    """Run the command that the process's arguments name; returns the exit code."""
    from harness import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
