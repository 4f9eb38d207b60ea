"""``run_helm.py calibrate``: prompts in, statistics out, one clear line for prompts that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from engine.errors import PolicyError
from engine.spec.policy import Policy
from harness.cli import main
from harness.identity import identity_of
from tests.support.records import make_record


def run(model: Path, prompts: Path, output: Path, *more: str) -> int:
    return main(["calibrate", "--model", str(model), "--prompts", str(prompts), "-o", str(output), *more])


def test_statistics_are_written_and_used(
    tiny_opt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "made" / "statistics.safetensors"
    prompts.write_text('{"prompt": "a b c"}\n\n{"text": "d e"}\n{"prompt": "never read"}\n')
    assert run(tiny_opt_dir, prompts, output, "--num-samples", "2", "--max-length", "4") == 0
    assert f"calibration={output}" in capsys.readouterr().out
    with safe_open(output, framework="pt") as file:
        assert int(file.metadata()["tokens"]) <= 8 and any("fc1" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("prompts.txt", None, "cannot be read"),
        ("prompts.txt", "\n  \n", "hold no text"),
        ("prompts.jsonl", "{", "prompts.jsonl, line 1: not an object"),
        ("prompts.jsonl", '{"prompt": "a"}\n{"question": "a"}\n', "prompts.jsonl, line 2: not an object"),
        ("prompts.jsonl", "[1]\n", 'not an object {"prompt" or "text": "..."}'),
    ],
)
def test_prompts_that_cannot_be_read_are_one_line(
    name: str, content: str | None, words: str, tiny_opt_dir: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prompts = tmp_path / name
    if content is not None:
        prompts.write_text(content)
    assert run(tiny_opt_dir, prompts, tmp_path / "s.safetensors") != 0
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and not (tmp_path / "s.safetensors").exists()


def test_other_statistics_under_the_same_name_are_other_answers(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    policy = Policy.parse(f"weight_quant=w8a8,calibration={path}")

    def identity() -> str:
        return identity_of(make_record(), policy, 0).digest

    with pytest.raises(PolicyError, match="cannot be read"):
        identity()
    path.write_bytes(b"one")
    first = identity()
    path.write_bytes(b"two")
    assert identity() != first
    path.write_bytes(b"one")
    assert identity() == first
