"""One module per subcommand; each offers ``register(subparsers)`` and is named in ``harness.cli``."""
