"""What others wrote is read within limits, and every refusal is one line that says what and where."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.errors import StorageError, first_line, printable
from engine.files.documents import (
    MOST_DEPTH,
    DocumentError,
    parse_json,
    parse_yaml,
    read_json,
)
from engine.files.whole import is_stream, write_whole

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(("text", "said"), [
    (DEEP, "is nested deeper than"),
    ("[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "is nested deeper than"),
    ('{"a":' * 5_000 + "1" + "}" * 5_000, "is nested deeper than"),
    ("", "is not JSON"),
    ("{", "is not JSON"),
    ("{}\n{", "at line 2"),
    ("nul", "at character 0"),
    ('{"a": 1, "a": 2}', "has the key 'a' twice"),
    ("[1" + "0" * 5_000 + "]", "digits: 64 bits are the most"),
    (f"[{2**64}]", "digits: 64 bits are the most"),
    (f"[-{10**30}]", "digits: 64 bits are the most"),
    ("[1e999]", "holds the number 1e999"),
    ("[1e+400]", "holds the number"),
    ("[" + "9" * 400 + ".0]", "holds the number"),
    ("[NaN]", "holds NaN"),
    ("[-Infinity]", "holds -Infinity"),
    ('["\\ud800"]', "half of a surrogate pair"),
    ('{"\\uDFFF": 1}', "half of a surrogate pair"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ("<!DOCTYPE html><title>404</title>", "a web page"),
    (b"\xff\xfe[\x00]\x00", "is not UTF-8"),
    (b'["\xc3"]', "is not UTF-8: byte 2, in line 1"),
])  # fmt: skip
def test_json_that_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_json(text)
    message = str(caught.value)
    assert said in message and "\n" not in message and len(message) < 200


@pytest.mark.parametrize(("text", "value"), [
    ("[" * MOST_DEPTH + "]" * MOST_DEPTH, None),
    (f"[{2**64 - 1}, -{2**63}, 1e308, 0.12345678901234567890]",
     [2**64 - 1, -(2**63), 1e308, 0.12345678901234568]),
    (b'\xef\xbb\xbf{"a": "\xc3\xbc"}', {"a": "ü"}),
    ('["\\ud83d\\ude00", "[[[["]', ["\U0001f600", "[[[["]),
    ("[" + ",".join(["[1]"] * 500) + "]", [[1]] * 500),
])  # fmt: skip
def test_json_that_is_read(text: str | bytes, value: Any) -> None:
    found = parse_json(text)
    assert value is None or found == value


def test_what_may_be_allowed() -> None:
    assert parse_json("[Infinity, 1e999]", finite=False) == [float("inf"), float("inf")]
    assert parse_json('["\\ud800"]', surrogates=True) == ["\ud800"]
    with pytest.raises(DocumentError, match="is longer than 4 B"):
        parse_json("[1, 2]", most=4)


def test_files_that_are_too_long_or_empty_of_sense(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\0" * 100)
    with pytest.raises(DocumentError, match="zero bytes"):
        read_json(path)
    with pytest.raises(DocumentError, match="is longer than"):
        read_json(Path("/dev/zero"), most=1000)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(("text", "value"), [
    ("a: 1.10\nb: on\nc: 012\nd: 2026-12-01\ne: ~\nf: 'null'\nh: .inf",
     {"a": "1.10", "b": "on", "c": "012", "d": "2026-12-01", "e": None, "f": "null", "h": ".inf"}),
    ("1.10: x", {"1.10": "x"}),
    ("base: &b {x: 1}\nmine:\n  <<: *b\n  y: 2", {"base": {"x": "1"}, "mine": {"x": "1", "y": "2"}}),
    ("one: &b {x: 1}\ntwo: {<<: *b, x: 2}", {"one": {"x": "1"}, "two": {"x": "2"}}),
    ("", None),
])  # fmt: skip
def test_yaml_values_are_texts(text: str, value: Any) -> None:
    assert parse_yaml(text) == value


def test_typed_yaml() -> None:
    assert parse_yaml("a: 1.10\nb: on", typed=True) == {"a": 1.1, "b": True}


BILLION = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
)
MERGED = "\n".join(
    ["m0: &m0 {" + ", ".join(f"k{n}: 1" for n in range(50)) + "}"]
    + [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 50)}]}}" for n in range(1, 9)]
)


@pytest.mark.parametrize(("text", "said"), [
    ("a: " + "[" * 5_000, "is nested deeper than"),
    ("- " * 5_000 + "x", "is nested deeper than"),
    ("a: &a [*a]", "is nested deeper than"),
    (BILLION, "stands for more than"),
    (MERGED, "merges more than"),
    ("a: 1\na: 2", "sets a twice: keep one (the second is in line 2)"),
    ("a: !!python/object/apply:os.system [ls]", "has the tag"),
    ("a: !!int '1'", "has the tag"),
    ("a: [", "is not YAML"),
    ("\t- a", "is not YAML"),
    ("a: 1\n---\nb: 2", "is not YAML"),
    ("a: *none", "is not YAML"),
    (b"\x7fELF\xff\xfe", "is not UTF-8"),
    ("\x07", "is not YAML"),
])  # fmt: skip
def test_yaml_that_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_yaml(text)
    message = str(caught.value)
    assert said in message and "\n" not in message and len(message) < 200


@pytest.mark.parametrize("text", ["when: 2024-13-45", "n: 1" + "0" * 6_000, BILLION, "a: &a [*a]"])
def test_typed_yaml_that_is_refused(text: str) -> None:
    with pytest.raises(DocumentError):
        parse_yaml(text, typed=True)


def test_other_libraries_words_are_cleaned() -> None:
    torch_says = (
        "Weights only load failed. This file can still be loaded, to do so you have two options, \x1b[1mdo "
        "those steps only if you trust the source of the checkpoint\x1b[0m. \n\t(1) Re-running `torch.load` "
        "with `weights_only` set to `False` will likely succeed"
    )
    assert first_line(ValueError(torch_says)) == "Weights only load failed."
    assert first_line(ValueError("Set allow_pickle=True. Or do not.")) == "Or do not."
    assert first_line(ValueError("\x1b[31m\n\n  second \x07")) == "second \N{REPLACEMENT CHARACTER}"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 1000))) == 203
    assert printable("a\x1b]0;title\x07b \u202e c\n\td") == "ab \N{REPLACEMENT CHARACTER} c d"


def test_a_stream_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_whole(pipe, b"through")
    reader.join(10)
    assert got == [b"through"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    write_whole(Path("/dev/null"), b"nowhere")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(StorageError, match="No space"):
        write_whole(Path("/dev/full"), b"too much")
    assert [is_stream(Path(name)) for name in ("/dev/stdout", "/dev/null", "/proc/self/fd/1")] == [True] * 3
    assert not is_stream(tmp_path) and not is_stream(tmp_path / "none") and not is_stream(Path("/dev/shm/x"))


def test_a_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "there" / "real.json")
    write_whole(link, b"{}")
    write_whole(link, b"[]")
    assert link.is_symlink() and (tmp_path / "there" / "real.json").read_bytes() == b"[]"
    assert os.listdir(tmp_path / "there") == ["real.json"]
