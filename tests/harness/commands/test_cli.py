"""The command line: light to start, one line per error, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.spec.hardware import Budgets
from engine.spec.policy import Policy
from harness import cli
from harness.commands.arguments import POLICY_FILE, read_policies
from harness.commands.run import DEMO_INSTANCES, DEMO_POLICIES, make_options
from tests.harness.conftest import PLUGIN

ROOT = Path(__file__).resolve().parents[3]

HEAVY = ("torch", "transformers", "helm", "datasets", "pandas", "matplotlib", "numpy")

Refused = Callable[..., str]


def execute(*argv: str, cwd: Path, first_on_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does."""
    environment = os.environ | {"PYTHONPATH": str(first_on_path or "")}
    command = [sys.executable, str(ROOT / "run_helm.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


def test_help_is_quick_and_names_the_commands(tmp_path: Path) -> None:
    began = os.times()
    done = execute("--help", cwd=tmp_path)
    ended = os.times()
    seconds = ended.children_user + ended.children_system - began.children_user - began.children_system
    assert seconds < 5, "of the processor: a fifth of one, and other workers do not matter"
    assert done.returncode == 0
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from harness import cli\n"
        "for argv in (['--help'], ['run', '--help']):\n"
        "    try: cli.main(argv)\n"
        "    except SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stderr.strip() == "[]"


def test_a_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rum"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--polciy", "resident"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "(did you mean '--policy'?)" in message and "run_helm.py run --help" in message
    assert cli.main(["report", "demo"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.suite.runner.run_suite", interrupted)
    assert cli.main(["run", "-o", str(tmp_path)]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_torchvision_that_does_not_fit_is_named_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    done = execute("run", "-o", str(tmp_path / "out"), cwd=tmp_path, first_on_path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip uninstall torchvision" in done.stderr
    assert "torchvision::nms" in done.stderr


def test_a_torchvision_without_its_operators_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    (tmp_path / "torchvision" / "extension.py").write_text("def _has_ops(): return False")
    done = execute("run", "-o", str(tmp_path / "out"), cwd=tmp_path, first_on_path=tmp_path)
    assert done.returncode == 2 and "pip uninstall torchvision" in done.stderr


def test_a_missing_helm_is_named_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "helm").mkdir()
    (tmp_path / "helm" / "__init__.py").write_text("")
    done = execute("run", "-o", str(tmp_path / "out"), cwd=tmp_path, first_on_path=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip install crfm-helm" in done.stderr


def test_without_arguments_it_is_the_demo() -> None:
    options = make_options(cli.build_parser().parse_args(["run"]))
    assert options.suite == "demo"
    assert [policy.name for policy in options.policies] == list(DEMO_POLICIES)
    assert options.max_eval_instances == DEMO_INSTANCES and options.conf_paths


def test_own_entries_are_not_the_demo() -> None:
    options = make_options(cli.build_parser().parse_args(["run", "-r", "simple1", "-r", "simple_mcqa"]))
    assert options.suite == "default" and options.max_eval_instances is None
    assert options.run_entries == ["simple1", "simple_mcqa"] and not options.conf_paths


def test_policies_come_from_the_file_inline_or_both() -> None:
    arguments = ["run", "--policy", "resident", "offloaded,kv_quant=4", "weights=disk,name=mine"]
    first, second, third = make_options(cli.build_parser().parse_args(arguments)).policies
    known = read_policies(POLICY_FILE)
    assert first == known["resident"]
    assert second.kv_quant is not None and second.weights == known["offloaded"].weights
    assert third == Policy.parse("weights=disk,name=mine")


def test_formats_are_put_on_top_of_every_policy() -> None:
    formats = ["--weight-quant", "mlp.*=3,default=4", "--kv-quant", "kivi"]
    arguments = ["run", "--policy", "resident", "offloaded,kv_quant=4", *formats]
    first, second = make_options(cli.build_parser().parse_args(arguments)).policies
    assert str(first.weight_quant) == str(second.weight_quant) == "mlp.*=3;default=4"
    assert str(first.kv_quant) == str(second.kv_quant) == "4-column/4+64"
    assert first.name == "resident,weight_quant=mlp.*=3;default=4,kv_quant=kivi"
    assert second.weights == read_policies(POLICY_FILE)["offloaded"].weights


def test_a_policy_file_of_ones_own_is_run_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine: {weights: disk}\n'2nd': {kv_quant: 4}\n")
    arguments = ["run", "--policy-file", str(tmp_path / "mine.yaml")]
    options = make_options(cli.build_parser().parse_args(arguments))
    assert [policy.name for policy in options.policies] == ["mine", "2nd"] and options.suite == "default"
    (chosen,) = make_options(cli.build_parser().parse_args([*arguments, "--policy", "2nd"])).policies
    assert chosen.name == "2nd"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x7fELF\xff\xfe", "is not UTF-8"),
        (b"when: [", "is not YAML"),
        (b"when: 2024-13-45", "must map names to mappings"),
        (b"mine: {1: 2}", "unknown policy key '1'"),
        (b"mine: {~: 2}", "policy 'mine' of mine.yaml has the key None, which is not a name"),
        (b"{}", "mine.yaml holds no policy"),
        (b"- mine", "must map names to mappings"),
    ],
)
def test_a_malformed_policy_file_is_one_clear_line(refused: Refused, content: bytes, said: str) -> None:
    Path("mine.yaml").write_bytes(content)
    assert said in refused("--policy-file", "mine.yaml")


@pytest.mark.parametrize("blocked", [".lock", "helm.log", "policies/resident/journal.jsonl"])
def test_a_folder_in_place_of_a_file_is_one_clear_line(refused: Refused, blocked: str) -> None:
    pytest.importorskip("helm.benchmark")
    path = Path("results/runs/default") / blocked
    path.mkdir(parents=True)
    assert f"cannot use {path}: Is a directory" in refused("-r", "toy_joint")


def test_sizes_and_seeds_are_read() -> None:
    arguments = ["run", "--host-memory", "2GiB", "--disk", "1000", "--seed", "3", "--random-weights"]
    options = make_options(cli.build_parser().parse_args(arguments))
    settings = options.settings
    assert settings.budgets == Budgets(device=None, host=2 << 30, disk=1000)
    assert (settings.seed, settings.weights) == (3, "random")


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_opt_dir: Path
) -> Refused:
    """Run a command that must fail over the tiny model; returns its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> str:
        given = [
            "run",
            "--no-report",
            "--plugins",
            PLUGIN,
            "--policy",
            "resident",
            "--model",
            str(tiny_opt_dir),
        ]
        code = cli.main([*given, *argv])
        lines = capsys.readouterr().err.splitlines()
        assert code in (1, 2) and lines[-1].startswith("error: ")
        assert not any(line.startswith(("error: ", "Traceback")) for line in lines[:-1])
        return lines[-1]

    return run


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--disk", "5zb"], "'5zb' is not a size"),
        (["-m", "0"], "'0' is not a whole number of at least 1"),
        (["--truncate", "left"], "invalid choice: 'left'"),
        (["--policy", "resid"], "did you mean 'resident'?"),
        (["--policy", "kv_quan=4"], "unknown policy key 'kv_quan' (did you mean 'kv_quant'?)"),
        (["--policy", "weights=0.5/0.5/0.5"], "sums to 1.5, not to 1"),
        (["--policy", "resident"], "two policies have one name"),
        (["--policy-file", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--suite", "a/b"], "suite 'a/b' is not a folder's name"),
        (["--suite", ""], "argument --suite: it is empty"),
        (["--model", ""], "argument --model: it is empty"),
        (["--model-name", " "], "argument --model-name: it is empty"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--device", "tpu"], "'tpu'"),
        (["--host-memory", "1KiB"], "in the host tier, which has 1.00 KiB (1,024 bytes)"),
        (
            ["--policy", "weights=disk", "--disk", "1KiB"],
            "in the disk tier, which has 1.00 KiB (1,024 bytes)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(refused: Refused, argv: list[str], said: str) -> None:
    pytest.importorskip("helm.benchmark")
    assert said in refused("-r", "toy_generation", *argv)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("toy_generatoin", "there is no scenario called 'toy_generatoin' (did you mean 'toy_generation'?)"),
        ("toy_generation:repeat", "is malformed (Expected <key>=<value>, got 'repeat')"),
        ("toy_generation:", "is malformed"),
        ("toy_generation:colour=red", "unexpected key 'colour'"),
        ("synthetic_reasoning", "does not fit its scenario: missing 1 required"),
        ("toy_broken_metric", "its metric Metric cannot be created (No module named"),
        ("toy_generation:repeat=-1,eval_instances=x", "its instances cannot be built"),
    ],
)
def test_a_wrong_run_entry_is_one_clear_line(refused: Refused, entry: str, said: str) -> None:
    pytest.importorskip("helm.benchmark")
    line = refused("-r", entry)
    assert repr(entry) in line and said in line


def test_a_prompt_that_does_not_fit_is_refused_where_truncation_is_forbidden(refused: Refused) -> None:
    pytest.importorskip("helm.benchmark")
    line = refused("-r", "toy_generation:repeat=20", "--truncate", "forbid")
    assert "do not fit the model's window of 256" in line and "--truncate right" in line


def test_a_folder_without_a_config_is_one_clear_line(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("-r", "toy_generation", "--model", str(tmp_path / "empty"))


def test_a_truncated_checkpoint_is_one_clear_line(
    refused: Refused, tmp_path: Path, tiny_opt_dir: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_opt_dir.iterdir():
        whole = file.read_bytes()
        (broken / file.name).write_bytes(whole[:-1000] if file.suffix == ".safetensors" else whole)
    assert "model.safetensors" in refused("-r", "toy_generation", "--model", str(broken))


def test_an_offload_folder_that_cannot_be_written_is_one_clear_line(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refused(
        "-r", "toy_generation", "--policy", "weights=disk", "--offload-dir", str(tmp_path / "file" / "x")
    )
    assert str(tmp_path / "file") in line


def test_run_entry_files_are_checked(refused: Refused, tmp_path: Path) -> None:
    pytest.importorskip("helm.benchmark")
    assert "there is no run entries file nowhere.conf" in refused("-c", "nowhere.conf")
    (tmp_path / "bad.conf").write_text("entries: [{priority: 1}]")
    assert "bad.conf is not a run entries file" in refused("-c", "bad.conf")


def test_a_plugin_that_is_not_there_is_one_clear_line(refused: Refused) -> None:
    pytest.importorskip("helm.benchmark")
    assert "plugin no_such_plugin cannot be imported" in refused(
        "-r", "simple1", "--plugins", "no_such_plugin"
    )


def test_what_could_not_be_scored_is_said_last(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_opt_dir: Path
) -> None:
    pytest.importorskip("helm.benchmark")
    argv = ["run", "-r", "toy_failing_metric", "toy_joint", "--plugins", PLUGIN, "--model", str(tiny_opt_dir)]
    argv += ["--policy", "resident", "-o", str(tmp_path), "--local-path", str(tmp_path / "prod_env")]
    assert cli.main(argv) == 1
    said = capsys.readouterr()
    assert "| toy_joint" in said.out and "report: " in said.out
    chosen = f"--suite default -o {tmp_path}"
    assert f"helm-summarize {chosen} --auto-generate-schema && helm-server {chosen}" in said.out
    assert said.err.splitlines()[-1].startswith("error: run 'toy_failing_metric:")


def test_a_report_needs_a_finished_suite(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["report", "--suite", "nothing", "-o", str(tmp_path)]) == 2
    assert "holds no finished suite" in capsys.readouterr().err
