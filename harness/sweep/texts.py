"""Texts that a curve is measured on: a file, a data set of the hub, or the demo's.

It knows files and the `datasets` library; tokens are another module's matter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UsageError, first_line
from engine.files.documents import DocumentError, parse_json

DEMO = "demo"
"""Stands for text of the demo's generators that the demo model has not seen."""

LAMBADA = "lambada"
"""Stands for the data set in which the last word of a passage is to be found."""

_LAMBADA_SET = "EleutherAI/lambada_openai::test"
_DEMO_MEMOS = 60
_DEMO_BREAK = "</s>"
"""What the demo model saw between two texts."""

_COLUMN = "text"


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        UsageError: if it cannot be read or is empty.
    """
    text = read_file(path, "text file")
    if not text.strip():
        raise UsageError(f"the text file {path} is empty: give one with text")
    return text


def read_dataset(name: str) -> str:
    """The rows of a hub data set ``name[:config[:split]]``, joined by empty lines; ``demo`` is made here.

    The split is ``test`` where none is named.

    Raises:
        UsageError: if it cannot be loaded or has no text.
    """
    if name == DEMO:
        return _DEMO_BREAK.join(_memos())
    text = "\n\n".join(_rows(name))  # as transformers' guide to perplexity joins them
    if not text.strip():
        raise UsageError(f"data set {name!r} is empty: choose another split")
    return text


def read_last_words(source: str) -> list[str]:
    """Passages whose last word is to be found: a JSONL file of ``{"text": ...}``, or ``lambada``.

    Raises:
        UsageError: if they cannot be read, or a passage has no last word.
    """
    if source == LAMBADA:
        passages = list(_rows(_LAMBADA_SET))
    else:
        content = read_file(Path(source), "file of passages", f"; give a JSONL file or {LAMBADA!r}")
        passages = list(json_texts(Path(source), content, [_COLUMN]))
    if not passages:
        raise UsageError(f'{source} holds no passages: write one object {{"text": ...}} a line')
    for number, passage in enumerate(passages, start=1):
        if len(passage.split()) < 2:
            raise UsageError(f"{source}, passage {number}: {passage!r} has no last word after others")
    return passages


def _memos() -> Iterator[str]:
    from scenarios.tasks import is_held_out
    from scenarios.tasks.memos import memo

    rng = random.Random("curve")
    made = 0
    while made < _DEMO_MEMOS:
        text = memo(rng, 9)
        if is_held_out(text):
            made += 1
            yield text


def json_texts(path: Path, content: str, keys: Sequence[str]) -> Iterator[str]:
    """Of every line, which is a JSON object, the text under the first of the keys that it has.

    Raises:
        UsageError: if a line is none.
    """
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except DocumentError:
            row = None
        found = next((row[key] for key in keys if key in row), None) if isinstance(row, dict) else None
        if not isinstance(found, str):
            wanted = " or ".join(f'"{key}"' for key in keys)
            raise UsageError(f'{path}, line {number}: not an object {{{wanted}: "..."}}')
        yield found


def read_file(path: Path, what: str, cure: str = "") -> str:
    """The text of a file, which messages call ``what``; ``cure`` ends that of a file that cannot be read.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the {what} {path} cannot be read: {error.strerror}{cure}") from None
    except UnicodeDecodeError:
        raise UsageError(f"the {what} {path} is not UTF-8: convert it") from None


def _rows(name: str) -> Iterator[str]:
    """The text column of a hub data set."""
    repository, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        from datasets import load_dataset

        rows: Any = load_dataset(repository, config or None, split=split or "test")
    except Exception as error:  # the hub, its network and its formats raise many types
        raise UsageError(
            f"data set {name!r} cannot be loaded ({first_line(error)}): "
            "check name:config:split and the connection"
        ) from error
    if _COLUMN not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UsageError(f"data set {name!r} has no column {_COLUMN!r} among {columns}: choose another")
    for row in rows:
        yield str(row[_COLUMN])
