"""Every file that is read may be damaged, or made by an attacker: one line, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import TierbenchError
from engine.memory.store.index import Index
from engine.models.checkpoint import load_config
from engine.models.formats.headers import read_header
from engine.models.weight_files import weight_files
from engine.planner import find_profile
from engine.spec.profile import HardwareProfile
from harness import cli
from harness.commands.arguments import read_policies
from harness.comparison.options import Model
from harness.files import JsonLines, read_json, require_json
from harness.helm.registry import write_prod_env
from harness.openai_batch.fields import LineError
from harness.openai_batch.request import read_envelope
from harness.openai_batch.results import AskedLine, ResultFile
from harness.report.inputs.json_file import Document
from harness.suite.gate import accepted_formats
from harness.suite.journal import Journal
from harness.suite.manifest import read_manifest
from harness.suite.score import read_score
from harness.sweep.texts import json_texts
from scenarios.records import read_rows

HOSTILE: dict[str, bytes] = {
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "digits": b'{"version": ' + b"9" * 6_000 + b"}",
    "infinite": b'{"a": 1e999}',
    "twice": b'{"a": 1, "a": 2}',
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "zeros": b"\0" * 200,
    "nothing": b"",
    "a number": b"7",
    "a list": b"[[]]",
    "nulls": b'{"rows": null, "model": null, "weight_map": null, "format": null}',
}


def _weights(path: Path, content: bytes) -> Path:
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    return path


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _score(folder: Path, content: bytes) -> Any:
    _file(folder, "per_instance_stats.json", content)
    _file(folder, "run_spec.json", b"{}")
    return require_json(folder / "per_instance_stats.json")


def _journal(folder: Path, content: bytes) -> int:
    journal = Journal(_file(folder, "journal.jsonl", content + b"\n"))
    journal.close()
    assert not journal.answers
    return journal.damaged


def _results(folder: Path, content: bytes) -> None:
    asked = AskedLine()
    try:
        ResultFile(_file(folder, "out.jsonl", content + b"\n"), asked).close()
    finally:
        asked.close()


READERS: dict[str, Callable[[Path, bytes], Any]] = {
    "journal": _journal,
    "manifest": lambda f, c: read_manifest(_file(f, "manifest.json", c)),
    "read_json": lambda f, c: read_json(_file(f, "any.json", c)),
    "HELM's file": _score,
    "table.json": lambda f, c: Document.read(_file(f, "table.json", c)).count("schema"),
    "curve.json": lambda f, c: accepted_formats(_file(f, "curve.json", c)),
    "profile": lambda f, c: HardwareProfile.load(_file(f, "profile.json", c)),
    "profile by name": lambda f, c: find_profile(str(_file(f, "profile.json", c))),
    "weight index": lambda f, c: weight_files(_file(f, "model.safetensors.index.json", c).parent),
    "header": lambda f, c: read_header(_weights(f / "model.safetensors", c)),
    "pickle": lambda f, c: read_header(_file(f, "pytorch_model.bin", c)),
    "config.json": lambda f, c: load_config("model", _file(f, "config.json", c).parent),
    "config.json of compare": lambda f, c: Model.read(_file(f, "config.json", c).parent),
    "policies": lambda f, c: read_policies(_file(f, "policies.yaml", c)),
    "texts": lambda f, c: list(json_texts(f / "x", c.decode("utf-8", "replace"), ["text"])),
    "records": lambda f, c: list(read_rows(str(_file(f, "rows.jsonl", c)))),
    "batch results": _results,
    "prod_env": lambda f, c: (_file(f, "model_metadata.yaml", c), write_prod_env(f, [])),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_it_is_refused_in_one_line_or_counts_as_missing(reader: str, what: str, tmp_path: Path) -> None:
    try:
        READERS[reader](tmp_path, HOSTILE[what])
    except TierbenchError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 600, message


@pytest.mark.parametrize("what", HOSTILE)
def test_a_line_of_a_batch_is_refused(what: str) -> None:
    with pytest.raises(LineError):
        read_envelope(HOSTILE[what], "")


@pytest.mark.parametrize("what", HOSTILE)
def test_the_index_of_the_store_is_refused(what: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        Index.from_json(HOSTILE[what].decode("utf-8", "replace"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--config", "--policy-file"])
@pytest.mark.parametrize("what", HOSTILE)
def test_files_of_the_command_line(flag: str, what: str, tmp_path: Path, capsys: Any) -> None:
    path = _file(tmp_path, "x.yaml", HOSTILE[what] + b"\n- [")
    assert cli.main(["run", flag, str(path), "--dry-run"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and str(path) in line


@pytest.mark.parametrize("record", [[1], {"a": 1}, 10**30, "\ud800", None])
def test_a_result_of_a_batch_that_no_job_wrote_is_no_answer(record: Any, tmp_path: Path) -> None:
    content = {"id": record, "custom_id": "a", "response": {"status_code": 200, "body": {}}, "error": None}
    path, asked = _file(tmp_path, "out.jsonl", json.dumps(content).encode() + b"\n"), AskedLine()
    try:
        ResultFile(path, asked).close()
        assert asked.claim("a", "mine", 1) and not path.read_bytes()
    except TierbenchError as error:
        assert "is not a batch result" in str(error)
    finally:
        asked.close()


def test_a_damaged_line_does_not_stop_a_journal(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.jsonl", b'{"a": 1}\n' + HOSTILE["deep lists"] + b'\n{"a": 2}\n')
    lines, found = JsonLines(path, unchecked=True), []
    lines.read(found.append)
    assert found == [{"a": 1}, {"a": 2}] and lines.damaged == 1


ABSURD = {
    "capacity": lambda p: p["capacity"].update(host=10**18 * 8),
    "bandwidth": lambda p: p["memory_bandwidth"].update(host=1e300),
    "rate": lambda p: p["logits"].update(rates=[[1e-300] for _ in p["logits"]["rates"]]),
    "latency": lambda p: p["links"][0].update(latency=1e30),
    "overhead": lambda p: p["overheads"].update(per_layer=1e300),
    "slowdown": lambda p: p.update(slowdown={"compute": {"disk read": 1e200}}),
}


@pytest.mark.parametrize("what", ABSURD)
def test_figures_that_no_machine_has_are_refused(what: str, tmp_path: Path, capsys: Any) -> None:
    content = json.loads(json.dumps(find_profile("t4").to_dict()))
    ABSURD[what](content)
    path = _file(tmp_path, "absurd.json", json.dumps(content).encode())
    command = ["plan", "--model", "opt-1.3b", "--profile", str(path), "--num-requests", "8"]
    assert cli.main(command) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and str(path) in line


def test_score_of_damaged_files_says_what_to_do(tmp_path: Path) -> None:
    _score(tmp_path, b"[]")
    _file(tmp_path, "per_instance_stats.json", HOSTILE["deep lists"])
    with pytest.raises(TierbenchError, match="run the suite again"):
        read_score(tmp_path)
