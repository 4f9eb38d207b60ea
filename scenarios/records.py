"""Rows of the user's own data: local JSONL, CSV or Parquet files, or a hub data set.

It yields (place, row) pairs, where ``place`` names file and row for error messages. It knows nothing of HELM;
``pyarrow`` and ``datasets`` are imported when they are needed.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import UsageError, first_line
from engine.files.documents import DocumentError, parse_json

LocatedRow = tuple[str, Mapping[str, Any]]
"""File and row as named in error messages, and the row's values by column."""

SUFFIXES = (".jsonl", ".csv", ".parquet")
"""Names that end so are local files; any other is passed to ``datasets.load_dataset``."""


class DataError(UsageError):
    """The user's data cannot be read or lack a column; the message names file, row and column."""


def read_rows(data: str, split: str = "test") -> Iterator[LocatedRow]:
    """All rows of a file, or of one split of a hub data set (or a folder of one), in order.

    Raises:
        DataError: if there is no such file or data set, or a row is malformed.
    """
    path = Path(data).expanduser()
    if _is_file(path):
        if not path.is_file():
            raise DataError(
                f"{data}: no such data file: give a file ending in {', '.join(SUFFIXES)} or a hub name"
            )
        readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
        if path.suffix.lower() not in readers:
            raise DataError(
                f"{data}: files ending in {path.suffix!r} are not read: use {', '.join(SUFFIXES)}"
            )
        try:
            yield from readers[path.suffix.lower()](path)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{data} cannot be read as {path.suffix[1:]}: {first_line(error)}") from error
    else:
        yield from _read_hub(data, split)


def hub_splits(data: str) -> list[str]:
    """The splits of a hub data set (or a folder of one); empty for a local file."""
    if _is_file(Path(data).expanduser()):
        return []
    from datasets import get_dataset_split_names

    try:
        return list(get_dataset_split_names(data))
    except Exception as error:
        raise _hub_error(data, error) from error


def _is_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or path.is_file()


def text_field(row: LocatedRow, column: str, option: str) -> str:
    """The text of one column; numbers are converted by ``str``.

    Args:
        option: the run-entry argument that names the column, for the error message.

    Raises:
        DataError: if the row has no such column or the column is empty.
    """
    place, values = row
    if column not in values:
        raise DataError(
            f"{place}: no column {column!r} among {', '.join(map(str, values))}: "
            f"rename one or add {option}=<name> to the run entry"
        )
    value = values[column]
    if value is None or str(value).strip() == "":
        raise DataError(f"{place}: column {column!r} is empty: fill it in or remove the row")
    return str(value)


def list_field(row: LocatedRow, column: str) -> tuple[str, ...]:
    """The items of a column that holds a list, or text separated by ``|``; none if the column is missing."""
    value = row[1].get(column)
    if value is None or isinstance(value, str):
        return tuple(part.strip() for part in (value or "").split("|") if part.strip())
    try:
        return tuple(str(part) for part in value)
    except TypeError:
        raise DataError(f"{row[0]}: column {column!r} is neither a list nor text separated by '|'") from None


def _read_jsonl(path: Path) -> Iterator[LocatedRow]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, row {number}"
            try:
                row = parse_json(line)
            except DocumentError as error:
                raise DataError(f"{place} {error}: one JSON object a line") from None
            if not isinstance(row, dict):
                raise DataError(f"{place}: a JSON {type(row).__name__}, not an object with named columns")
            yield place, row


def _read_csv(path: Path) -> Iterator[LocatedRow]:
    with open(path, encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, strict=True), start=1):
            place = f"{path}, row {number}"
            if None in row:
                raise DataError(
                    f"{place}: more fields than the header has columns: quote fields that hold commas"
                )
            yield place, row


def _read_parquet(path: Path) -> Iterator[LocatedRow]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} cannot be read as parquet: {first_line(error)}") from error


def _read_hub(data: str, split: str) -> Iterator[LocatedRow]:
    from datasets import load_dataset

    try:
        rows = load_dataset(data, split=split)
    except Exception as error:
        raise _hub_error(data, error) from error
    for number, row in enumerate(rows, start=1):
        yield f"{data}[{split}], row {number}", row


def _hub_error(data: str, error: Exception) -> DataError:
    return DataError(
        f"{data!r} is neither a local file nor a hub data set that can be loaded ({first_line(error)}): "
        f"give a file ending in {', '.join(SUFFIXES)} or check the name and the connection"
    )
