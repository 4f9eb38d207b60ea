"""``models``: families tried, and what one checkpoint is."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.families import Family
from harness.cli import main
from harness.commands.models import families_table

DEMO = Path(__file__).resolve().parents[3] / "scenarios" / "demo" / "model"


def test_one_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", str(DEMO)]) == 0
    text = capsys.readouterr().out
    assert "OPTForCausalLM" in text and "1,055,744 parameters" in text
    assert "4.00 KiB per token" in text and "no tensor is left out" in text
    assert "| attention |      4 |                 256 |" in text


def test_some_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--family", "gpt2", "bloom", "openai-gpt"]) == 0
    text = capsys.readouterr().out
    assert "| `gpt2` | GPT2LMHeadModel | equal | packed |" in text
    assert "| `bloom` | BloomForCausalLM | equal | attention |" in text
    assert "| `openai-gpt` | OpenAIGPTLMHeadModel | refused |" in text and "keeps no keys and values" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "gemm3"], "did you mean 'gemma3'"),
        (["somewhere", "--family", "gpt2"], "not both"),
        (["/nowhere/at/all"], "is not a folder"),
    ],
)
def test_what_cannot_be_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_table_counts_text_models_and_wrappers_apart() -> None:
    rows = [
        Family("one", "OneForCausalLM", False, "equal", "packed", 1.0),
        Family("two", "TwoForCausalLM", False, "refused", "a | b", 1.0),
        Family("many", "ManyForConditionalGeneration", True, "equal", "packed", 1.0),
    ]
    lines = families_table(rows, "5.23.0")
    assert "- text models: 1 equal, 1 refused" in lines
    assert "- wrappers with a text decoder: 1 equal" in lines
    assert lines[-2] == "| `two` | TwoForCausalLM | refused | a \\| b |"
