"""The user's own data: the three file formats give the same rows, and each mistake is one clear line."""

import csv
import json
from pathlib import Path

import pytest

from scenarios.records import DataError, list_field, read_rows, text_field

ROWS = [
    {"input": "Passage one\nField: city", "output": "Reno", "choices": ["Reno", "Miami"]},
    {"input": "Passage, two", "output": "17", "choices": ["17", "18"]},
]


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format of the file's suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({**row, "choices": "|".join(row["choices"])} for row in rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}", ROWS)
    before = path.read_bytes()
    rows = list(read_rows(str(path)))
    assert [text_field(row, "input", "input_column") for row in rows] == [row["input"] for row in ROWS]
    assert [text_field(row, "output", "output_column") for row in rows] == ["Reno", "17"]
    assert [list_field(row, "choices") for row in rows] == [("Reno", "Miami"), ("17", "18")]
    assert path.read_bytes() == before


def message(action) -> str:
    """The one line that the action is refused with."""
    with pytest.raises(DataError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def test_a_missing_column_names_file_row_and_column(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"input": "three", "answer": "x"}])
    rows = list(read_rows(str(path)))
    text = message(lambda: [text_field(row, "output", "output_column") for row in rows])
    assert f"{path}, row 3: no column 'output' among input, answer" in text
    assert "output_column=" in text


def test_an_empty_field_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", [*ROWS, {"input": "three", "output": " ", "choices": []}])
    rows = list(read_rows(str(path)))
    text = message(lambda: [text_field(row, "output", "output_column") for row in rows])
    assert text.startswith(f"{path}, row 3: column 'output' is empty")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", b'{"input": "a"}\n{"input": \n', "row 2 is not JSON"),
        ("rows.jsonl", b'["a", "b"]\n', "row 1: a JSON list, not an object"),
        ("rows.jsonl", b"\xff\xfe\n", "cannot be read as jsonl"),
        ("rows.csv", b"input,output\na,b,c\n", "row 1: more fields than the header"),
        ("rows.csv", b'input,output\n"a,b\n', "cannot be read as csv"),
        ("rows.parquet", b"not parquet at all", "cannot be read as parquet"),
        ("rows.xml", b"<a/>", "files ending in '.xml' are not read"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    text = message(lambda: list(read_rows(str(path))))
    assert str(path) in text and expected in text


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    assert message(lambda: list(read_rows(str(path)))).startswith(f"{path}: no such data file")


def test_a_hub_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    text = message(lambda: list(read_rows("some/name")))
    assert text.startswith("'some/name' is neither a local file nor a hub data set") and "no route" in text


def test_a_hub_data_set_is_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"test": datasets.Dataset.from_list([{"input": "a", "output": "b"}])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: splits[split])
    assert list(read_rows("some/name", "test")) == [("some/name[test], row 1", {"input": "a", "output": "b"})]
