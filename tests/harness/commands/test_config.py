"""Configuration files: flags win, wrong keys and values are named, a printed file can be read again."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from harness import cli, config
from harness.commands.run import DEMO_INSTANCES, make_options
from tests.harness.conftest import PLUGIN

Configure = Callable[[str], str]

REQUIRED = {
    "compare": ["--model", "m"],
    "plan": ["--model", "opt-125m"],
    "throughput": ["--model", "opt-125m"],
    "batch": ["-i", "in.jsonl", "-o", "out.jsonl", "--model", "m"],
    "lm_eval": ["--model", "m", "-t", "a"],
    "report": ["--suite", "s"],
    "calibrate": ["--model", "m", "--prompts", "p.txt", "-o", "s.safetensors"],
}
"""Flags that a command cannot do without, by its module."""


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Write a configuration file; returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parse(*argv: str) -> argparse.Namespace:
    return config.parse(cli.build_parser, argv)


def test_values_go_through_the_types_of_the_flags(configure: Configure) -> None:
    path = configure(
        "max-eval-instances: 5\nhost-memory: 2GiB\ndisk: 1000\nseed: -3\nsuite: 30\noutput-path: out\n"
        "truncate: forbid\nrandom-weights: true\ndry-run: false\nmodel-name: null\n"
        "run-entries:\n- simple1\n- toy:mode=a,b=1\nplugins: one\n"
    )
    args = parse("run", "--config", path)
    assert (args.max_eval_instances, args.host_memory, args.disk, args.seed) == (5, 2 << 30, 1000, -3)
    assert (args.suite, args.output_path, args.truncate) == ("30", Path("out"), "forbid")
    assert args.random_weights is True and args.dry_run is False and args.model_name is None
    assert args.run_entries == ["simple1", "toy:mode=a,b=1"] and args.plugins == ["one"]
    assert args.device == "auto", "what neither says is the flag's default"


def test_flags_win_over_the_file_and_lists_are_replaced(configure: Configure) -> None:
    path = configure("run-entries: [simple1, simple_mcqa]\nseed: 7\nsuite: mine\npolicy: [resident]\n")
    args = parse("run", "-r", "toy", "--seed", "0", "--config", path)
    assert args.run_entries == ["toy"] and args.seed == 0 and args.suite == "mine"
    assert args.policy == ["resident"]


def test_a_file_can_hold_what_is_required(configure: Configure) -> None:
    path = configure("input: a.jsonl\noutput: b.jsonl\nserved-model-name: [x, y]\n")
    args = parse("batch", "--model", "m", "--config", path)
    assert (args.input, args.output, args.served_model_name) == (Path("a.jsonl"), Path("b.jsonl"), ["x", "y"])


def test_what_is_required_is_still_required(capsys: pytest.CaptureFixture[str], configure: Configure) -> None:
    assert cli.main(["batch", "--config", configure("seed: 1\n")]) == 2
    assert "required: -i/--input/--input-file" in capsys.readouterr().err


def test_hyphens_and_underscores_are_one(configure: Configure) -> None:
    path = configure(
        "num-fewshot: 3\ninclude_path: tasks\ntrust_remote_code: true\napply_chat_template: true\n"
    )
    args = parse("lm-eval", "--model", "m", "-t", "a", "--config", path)
    assert (args.num_fewshot, args.include_path) == (3, "tasks")
    assert args.trust_remote_code is True and args.apply_chat_template is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("polcy: resident", "has the key 'polcy', which is unknown (did you mean 'policy'?)"),
        ("zzz: 1", "'zzz', which is unknown: use one of adapter, chat, conf-paths"),
        ("config: other.yaml", "has the key 'config', which is unknown"),
        ("max-eval-instances: 0", "argument -m/--max-eval-instances: '0' is not a whole number"),
        ("disk: 5zb", "argument --disk: '5zb' is not a size"),
        ("truncate: left", "invalid choice: 'left'"),
        ("suite: [a, b]", "suite is a list, but takes one value: write suite: VALUE"),
        ("dry-run: 1", "dry-run is '1': write true or false"),
        ("debug: {a: 1}", "debug is {'a': '1'}: write true or false"),
        ("suite: !!int 1", "has the tag tag:yaml.org,2002:int in line 1"),
        ("policy: [{weights: disk}]", "policy holds {'weights': 'disk'}, which is neither"),
        ("suite: a\nsuite: b", "sets suite twice: keep one"),
        ("run-entries: a\nrun_entries: b", "sets run_entries twice, as run-entries too: keep one"),
        ("[a, b]", "must map names of flags to values"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], configure: Configure, text: str, said: str
) -> None:
    path = configure(text)
    assert cli.main(["run", "--config", path]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and path in line and said in line


def test_help_shows_true_defaults_beside_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--config", "x.yaml", "--help"])
    assert "default: results" in capsys.readouterr().out


def test_a_missing_file_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("module", cli.COMMANDS)
def test_what_is_printed_can_be_given_back(
    capsys: pytest.CaptureFixture[str], configure: Configure, module: str
) -> None:
    name = module.replace("_", "-")
    argv = [name, *REQUIRED.get(module, []), *_positional(name)]
    assert cli.main([*argv, "--print-config"]) == 0
    printed = capsys.readouterr().out
    path = configure(printed)
    assert cli.main([name, "--config", path, "--print-config", *_positional(name)]) == 0
    assert capsys.readouterr().out == printed
    known = set(config.settings_of(config.commands_of(cli.build_parser())[name]))
    assert set(yaml.safe_load(printed)) == known


def test_the_printed_demo_says_what_the_demo_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["suite"] == "demo" and shown["max-eval-instances"] == DEMO_INSTANCES
    assert shown["policy"] == ["resident", "offloaded", "offloaded-4bit"] and shown["conf-paths"]


def test_a_suite_runs_from_a_file_alone(tmp_path: Path, configure: Configure, tiny_opt_dir: Path) -> None:
    pytest.importorskip("helm.benchmark")
    settings = {
        "run-entries": ["toy_joint"], "plugins": [PLUGIN], "model": str(tiny_opt_dir), "policy": ["resident"],
        "suite": "filed", "output-path": str(tmp_path), "local-path": str(tmp_path / "prod_env"),
        "no-report": True,
    }  # fmt: skip
    assert cli.main(["run", "--config", configure(yaml.safe_dump(settings))]) == 0
    (row,) = json.loads((tmp_path / "runs" / "filed" / "table.json").read_text())["rows"]
    assert row["run_entry"] == "toy_joint" and row["policy"] == "resident"


def test_the_documented_file_is_read(configure: Configure) -> None:
    document = (Path(__file__).resolve().parents[3] / "docs" / "command_line.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", document, re.S)
    options = make_options(parse("run", "--config", configure(text), "--max-eval-instances", "5"))
    assert [policy.name for policy in options.policies] == ["resident", "offloaded,kv_quant=4"]
    assert options.run_entries == ["information_extraction", "form_processing:seed=7"]
    assert (options.max_eval_instances, options.settings.budgets.host, options.suite) == (
        5,
        2 << 30,
        "from-a-file",
    )


def _positional(name: str) -> list[str]:
    """Arguments without a name, which cannot be in a file."""
    command = config.commands_of(cli.build_parser())[name]
    needed = [action for action in command._actions if not action.option_strings and action.required]
    return [str(next(iter(action.choices or ["x"]))) for action in needed]
