"""The help of every command has three examples that work, and shells complete the parser's options."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from harness import cli, config
from harness.commands.completion import script
from tests.support.store_entries import make

ROOT = Path(__file__).resolve().parents[3]

COMMANDS = [module.replace("_", "-") for module in cli.COMMANDS]


def examples(name: str) -> list[list[str]]:
    """The arguments of every example in a command's help."""
    epilog = config.commands_of(cli.build_parser())[name].epilog or ""
    found = re.findall(r"^  run_helm\.py (.*)", epilog.replace("\\\n", " "), re.MULTILINE)
    return [_until_redirected(shlex.split(arguments, comments=True)) for arguments in found]


def _until_redirected(words: list[str]) -> list[str]:
    return words[: words.index(">")] if ">" in words else words


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working folder, with the repository's scenarios and the files that the examples name."""
    (tmp_path / "scenarios").symlink_to(ROOT / "scenarios")
    bodies = [{"prompt": "Question: Is 24 even?", "max_tokens": 8}, {"prompt": "a", "max_tokens": 2}]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "prompts.txt").write_text("Question: Is 24 even?\nAnswer: yes\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": "Question: Is 24 even?"}) + "\n")
    (tmp_path / "report.yaml").write_text("output-path: /data/results\n")
    task = {
        "task": "my_choice", "dataset_path": "json", "test_split": "train", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": str(tmp_path / "my_tasks" / "rows.json")},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "doc_to_choice": ["yes", "no"],
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "my_choice.yaml").write_text(json.dumps(task))
    rows = [{"question": f"Is {i} even?", "answer": i % 2} for i in range(6)]
    (tmp_path / "my_tasks" / "rows.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_three_examples_that_are_understood(name: str, here: Path) -> None:
    found = examples(name)
    assert len(found) >= 3, f"the epilog of {name} needs three lines that begin with '  run_helm.py'"
    for arguments in found:
        assert config.parse(cli.build_parser, arguments).execute is not None


def test_examples_of_run_and_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("helm.benchmark")
    first, _, third = examples("run")
    assert cli.main(first) == 0
    assert "| information_extraction" in capsys.readouterr().out
    assert cli.main(third) == 0
    (here / "speed.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["run", "--config", "speed.yaml", "--dry-run"]) == 0
    assert "policy half, peak memory:" in capsys.readouterr().out
    report = examples("report")[0]
    assert cli.main([argument.replace("demo", "first") for argument in report]) == 0
    assert "report.html" in capsys.readouterr().out


def test_an_example_of_batch(here: Path) -> None:
    assert cli.main(examples("batch")[0]) == 0
    assert len((here / "results.jsonl").read_text().splitlines()) == 2


def test_an_example_of_lm_eval(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    assert cli.main(examples("lm-eval")[0]) == 0
    assert "my_choice" in capsys.readouterr().out


def test_examples_of_calibrate(here: Path) -> None:
    first, _, third = examples("calibrate")
    assert cli.main(first) == 0 and cli.main(third) == 0
    assert (here / "demo.safetensors").is_file()


def test_examples_of_store(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIERBENCH_STORE", str(here / "store"))
    for arguments in examples("store"):
        elsewhere = [word.replace("/data", str(here)) for word in arguments]
        make(here / "store").close()
        assert cli.main(elsewhere) == 0
        assert str(here / "store") in capsys.readouterr().out


def test_examples_of_completion(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in examples("completion"):
        assert cli.main(arguments) == 0
        assert "run_helm.py" in capsys.readouterr().out


def complete(*words: str) -> list[str]:
    """Bash's completions of the last of these words."""
    line = " ".join(map(shlex.quote, words))
    code = (
        f"{script(cli.build_parser(), 'bash')}\n"
        f"COMP_WORDS=({line}) COMP_CWORD={len(words) - 1}\n_tierbench\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-u", "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_offers_commands() -> None:
    assert complete("run_helm.py", "") == COMMANDS
    assert complete("run_helm.py", "bat") == ["batch"]
    assert complete("run_helm.py", "--h") == ["--help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_bash_offers_every_flag_of_a_command(name: str) -> None:
    actions = config.settings_of(config.commands_of(cli.build_parser())[name]).values()
    flags = {option for action in actions for option in action.option_strings}
    assert flags <= set(complete("tierbench", name, "-"))


def test_bash_offers_choices_files_and_nothing_after_free_values(here: Path) -> None:
    assert complete("run_helm.py", "run", "--truncate", "") == ["right", "forbid"]
    assert complete("run_helm.py", "run", "--config", "rep") == ["report.yaml"]
    assert complete("run_helm.py", "run", "--suite", "") == []
    assert "--suite" in complete("run_helm.py", "run", "--dry-run", "")
    assert complete("run_helm.py", "completion", "") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_their_scripts(shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    text = script(cli.build_parser(), shell)
    done = subprocess.run([program, "-n"], input=text, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_fish_is_told_every_flag() -> None:
    text = script(cli.build_parser(), "fish")
    for name, command in config.commands_of(cli.build_parser()).items():
        for flag in config.settings_of(command):
            assert re.search(rf"__fish_seen_subcommand_from {name}' .*-l {re.escape(flag)} ", text)
    assert "-l truncate -x -a 'right forbid'" in text
