"""``run_helm.py store``: show, check and clear the store of packed weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from engine.errors import UsageError
from engine.units import format_bytes
from harness.commands.arguments import add_store
from harness.commands.flags import SWITCH, add_flag
from harness.text_table import markdown_table

if TYPE_CHECKING:
    from engine.stored import EntryStatus, ModelStore

DESCRIPTION = (
    "Weights are packed once per model and format and kept in a store that later runs read from. Each entry "
    "has a key, whose beginning is enough to name it. list shows the entries, remove deletes those that no "
    "process uses, verify reads them and compares checksums, path prints the store's folder."
)

EPILOG = """\
examples:
  # what is in the store
  run_helm.py store list

  # everything, in a store of another place
  run_helm.py store verify --all --store /data/store

  # clear the store; later runs pack their weights again
  run_helm.py store remove --all
"""

_SHOWN_DIGITS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("action", choices=tuple(_ACTIONS), help="what to do")
    parser.add_argument("keys", nargs="*", default=[], metavar="KEY", help="entries of remove and verify")
    add_flag(parser, "--all", "all entries, instead of keys", SWITCH)
    add_store(parser)


def execute(args: argparse.Namespace) -> int:
    """Do what was asked; 1 if an entry is damaged, or was to be removed and is in use.

    Raises:
        UsageError: for keys where none belong, none where some do, and keys that are not in the store.
        StorageError: if the folder cannot be read or written.
    """
    from engine.stored import ModelStore

    if args.action in ("list", "path"):
        if args.keys or args.all:
            raise UsageError(f"store {args.action} takes neither keys nor --all")
    elif bool(args.keys) == args.all:
        raise UsageError(f"store {args.action} wants keys, as run_helm.py store list shows them, or --all")
    return _ACTIONS[args.action](ModelStore(args.store), args.keys)


def _path(stored: ModelStore, keys: Sequence[str]) -> int:
    print(stored.root)
    return 0


def _list(stored: ModelStore, keys: Sequence[str]) -> int:
    models = stored.entries()
    if not models:
        print(f"{stored.root} is empty")
        return 0
    rows = [("key", "model", "weights", "kept at", "made", "state", "size")]
    rows += [
        (
            model.key[:_SHOWN_DIGITS],
            model.about.model or "-",
            model.about.weights or "-",
            model.about.formats or "-",
            datetime.fromtimestamp(model.created).strftime("%Y-%m-%d %H:%M") if model.created else "-",
            "damaged" if model.damage else "in use" if model.in_use else "",
            format_bytes(model.nbytes),
        )
        for model in models
    ]
    print("\n".join(markdown_table(rows, left=6)))
    print(f"\n{_counted(models)} in {stored.root}")
    for model in models:
        if model.damage:
            print(model.damage)
    return 0


def _remove(stored: ModelStore, keys: Sequence[str]) -> int:
    models = stored.chosen(keys) if keys else stored.entries()
    used = [model for model in models if not stored.remove(model.key)]
    for model in used:
        print(f"{model.key[:_SHOWN_DIGITS]} is in use and stays: end the run that uses it first")
    print(f"removed {_counted([model for model in models if model not in used])} from {stored.root}")
    return 1 if used else 0


def _verify(stored: ModelStore, keys: Sequence[str]) -> int:
    damaged = 0
    for model, damage in stored.verify(stored.chosen(keys) if keys else stored.entries()):
        damaged += bool(damage)
        print(
            f"{model.key[:_SHOWN_DIGITS]} {damage or f'is as it was written ({format_bytes(model.nbytes)})'}"
        )
    print(f"{damaged} damaged in {stored.root}")
    return 1 if damaged else 0


def _counted(models: Sequence[EntryStatus]) -> str:
    size = format_bytes(sum(model.nbytes for model in models))
    return f"{len(models)} {'entry' if len(models) == 1 else 'entries'}, {size},"


_ACTIONS: dict[str, Callable[[ModelStore, Sequence[str]], int]] = {
    "list": _list, "remove": _remove, "verify": _verify, "path": _path,
}  # fmt: skip
