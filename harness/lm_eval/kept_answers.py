"""Where lm-eval keeps answers: a data base for each identity, as its own keys are the requests alone.

PATH-<identity>_rank0.db     lm-eval's data base
PATH-<identity>.json         what its answers depend on, part by part
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path

from harness.files import read_json, write_json
from harness.identity import Identity, since
from harness.progress.line import Progress
from harness.tokenizer import Text

_DATA_BASE = "_rank0.db"
"""What lm-eval appends to the path that it is given."""


def kept_answers(path: str, identity: Identity, text: Text, progress: Progress) -> str:
    """The path to give to lm-eval, so that it finds no other identity's answers; says what is not used.

    A chat template goes on showing the day on which the answers were begun.

    Args:
        path: the user's.
        text: its ``today`` is set to that day.

    Raises:
        StorageError: if the identity cannot be written beside the data base.
    """
    beside = dict(_identities(Path(path)))
    for parts in beside.values():
        if identity.date and not identity.changed_from({**parts, "date": identity.date}):
            with suppress(KeyError, ValueError):  # a damaged one: a day of its own
                text.today = date.fromisoformat(parts["date"])
                identity = replace(identity, date=parts["date"])
    own = f"{path}-{identity.short}"
    if not Path(own + _DATA_BASE).exists():
        changes = sorted((identity.changed_from(parts) for parts in beside.values()), key=len)
        if changes and changes[0]:
            progress.say(f"answers kept at {path} are not used{since(changes[0])}")
        elif not changes and Path(path + _DATA_BASE).exists():
            progress.say(f"{path}{_DATA_BASE} is not used: it does not say what its answers are of")
    write_json(Path(f"{own}.json"), identity.to_dict())
    return own


def _identities(path: Path) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """The identities beside a data base's path."""
    if not path.parent.is_dir():
        return
    for file in sorted(path.parent.iterdir()):
        if file.name.startswith(f"{path.name}-") and file.suffix == ".json":
            parts = read_json(file)
            if isinstance(parts, dict) and all(isinstance(part, str) for part in parts.values()):
                yield file, parts
