"""What changes one part of an identity changes nothing else; no front end keeps answers of another one."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.engine import Engine
from engine.spec.policy import Policy
from engine.spec.record import AnsweredBy, MachineRecord
from harness import cli
from harness.identity import Identity, identity_of, since
from harness.lm_eval.kept_answers import kept_answers
from harness.openai_batch.response import changed_parts, shown_date, shown_fingerprint
from harness.progress.line import Progress
from harness.suite.manifest import kept_date
from harness.suite.options import SuiteOptions
from harness.suite.runner import run_suite
from harness.tokenizer import Text
from tests.harness.conftest import OptionsMaker
from tests.harness.lm_eval.lm_eval_tasks import save_tasks
from tests.harness.openai_batch.batch_files import CHAT, TEMPLATE, body, line, records, run, write
from tests.support.changed_models import CHANGES, chat_template, end_ids, tokenizer, weights
from tests.support.counting_engine import CountingEngine
from tests.support.records import make_record

DATED = TEMPLATE.replace("assistant:", "{{ strftime_now('%d %b %Y') }} assistant:")


OPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "formats": ("--policy resident,weight_quant=4", ("formats",)),
    "cache": ("--policy resident,kv_quant=4", ("formats",)),
    "seed": ("--seed 3", ("seed",)),
    "random weights": ("--random-weights", ("weights or config",)),
}
"""Other flags of a command, and the parts that change by them."""


@pytest.fixture
def model(tiny_opt_dir: Path, tmp_path: Path) -> Path:
    """A model that a test may change."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_opt_dir, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def identity(folder: Path, **chosen: Any) -> Identity:
    with Engine(folder) as engine:
        return identity_of(engine.record(), Policy(), 0, Text.load(str(folder)), **chosen)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_folder_is_named_by_its_part(model: Path, change: Callable[[Path], None]) -> None:
    before = identity(model)
    assert identity(model) == before
    change(model)
    after = identity(model)
    assert set(after.changed_from(before.to_dict())) >= set(CHANGES[change])
    assert len(after.changed_from(before.to_dict())) <= 2, "start ids are a part of the tokenizer"
    assert changed_parts(after, shown_fingerprint(before)) == after.changed_from(before.to_dict())
    assert after.digest != before.digest


def test_another_folder_with_the_same_files_is_the_same(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "elsewhere")
    assert identity(tmp_path / "elsewhere") == identity(model)


def test_calls_of_a_tokenizer_do_not_change_it(model: Path) -> None:
    text = Text.load(str(model))
    first = identity_of(make_record(), Policy(), 0, text)
    other = Text.load(str(model))
    other.tokenizer(["a", "b c d"], truncation=True, max_length=2, padding=True)
    assert identity_of(make_record(), Policy(), 0, other) == first


@pytest.mark.parametrize(
    ("changes", "with_times", "parts"),
    [
        ({"policy": Policy(name="other")}, True, []),
        ({"policy": Policy(device_batch=3)}, False, []),
        ({"policy": Policy(device_batch=3)}, True, ["placement, schedule or machine"]),
        ({"policy": Policy.parse("attention_fraction=0.5")}, False, ["formats"]),
        ({"policy": Policy.parse("matmul_precision=medium")}, False, ["formats"]),
        ({"seed": 1}, False, ["seed"]),
        ({"record": make_record(hardware=MachineRecord("cuda: some"))}, False, ["device"]),
        ({"record": make_record(hardware=MachineRecord("pretend"))}, False, []),
        (
            {"record": make_record(answered_by=AnsweredBy("vllm", "full", {}, 5))},
            False,
            ["system's settings or packages"],
        ),
    ],
)
def test_what_else_counts(changes: dict[str, Any], with_times: bool, parts: list[str]) -> None:
    usual: dict[str, Any] = {"record": make_record(), "policy": Policy(), "seed": 0}
    before = identity_of(**usual, with_times=with_times)
    after = identity_of(**usual | changes, with_times=with_times)
    assert after.changed_from(before.to_dict()) == parts
    assert (after.digest == before.digest) is not bool(parts)


def test_what_answered_another_way_is_named_so() -> None:
    assert changed_parts(Identity("a"), "fp_0123456789abcdef01234567") == ["version of this program"]
    older = Identity("a", program="0")
    assert Identity("a").changed_from(older.to_dict()) == ["version of this program"]
    assert since(["a", "b"]) == ", since these changed: a, b"


@pytest.mark.parametrize("change", [weights, tokenizer, end_ids, chat_template], ids=lambda one: one.__name__)
def test_a_batch_refuses_answers_of_a_changed_folder(
    model: Path, change: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write(tmp_path / "in", [line("a")]), tmp_path / "out"
    assert run(model, source, output) == 0
    kept = output.read_bytes()
    change(model)
    assert run(model, source, output) == 2
    said = capsys.readouterr().err
    assert f"is not this one's{since(CHANGES[change])}; choose another --output" in said
    assert output.read_bytes() == kept


@pytest.mark.parametrize("what", OPTIONS)
def test_a_batch_refuses_answers_of_other_flags(
    model: Path, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write(tmp_path / "in", [line("a")]), tmp_path / "out"
    assert run(model, source, output) == 0
    flags, parts = OPTIONS[what]
    assert run(model, source, output, *flags.split()) == 2
    assert f"is not this one's{since(parts)};" in capsys.readouterr().err
    assert run(model, source, output, "--policy", "offloaded") == 0, "placement changes no answer"


@pytest.mark.parametrize("change", [weights, tokenizer, end_ids, chat_template], ids=lambda one: one.__name__)
def test_a_suite_computes_anew(
    model: Path, change: Callable[[Path], None], make_options: OptionsMaker, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("helm.benchmark")
    options: SuiteOptions = make_options(tmp_path / "out", model=str(model), run_entries=["toy_joint"])
    CountingEngine.calls.clear()
    run_suite(options, CountingEngine)
    change(model)
    run_suite(options, CountingEngine)
    assert CountingEngine.calls == [4, 4]
    assert f"4 kept answers are not used{since(CHANGES[change])}\n" in capsys.readouterr().err
    run_suite(options, CountingEngine)
    assert CountingEngine.calls == [4, 4]


def lm_eval(model: Path, folder: Path, *more: str) -> int:
    kept = ["--use_cache", str(folder / "kept"), "--include_path", str(folder / "tasks")]
    return cli.main(["lm-eval", "--model", str(model), "--tasks", "my_choice", "--limit", "2", *kept, *more])


@pytest.mark.parametrize(
    "what",
    [weights, tokenizer, end_ids, "formats", "random weights"],
    ids=lambda what: what if isinstance(what, str) else what.__name__,
)
def test_lm_eval_computes_anew(
    model: Path, what: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    monkeypatch.setattr("engine.engine.Engine", CountingEngine)
    save_tasks(tmp_path / "tasks", "Answer:", " water")
    CountingEngine.calls.clear()
    assert lm_eval(model, tmp_path) == 0 == lm_eval(model, tmp_path)
    (asked,) = CountingEngine.calls
    flags, parts = OPTIONS[what] if isinstance(what, str) else ("", CHANGES[what])
    if not flags:
        what(model)
    assert lm_eval(model, tmp_path, *flags.split()) == 0
    assert CountingEngine.calls == [asked, asked]
    said = capsys.readouterr().err
    assert f"answers kept at {tmp_path / 'kept'} are not used{since(parts)}\n" in said


def test_a_conversation_shows_the_day_on_which_it_was_begun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "chat_template.jinja").write_text(DATED)
    text = Text.load(str(model))
    text.today = date(2026, 2, 28)
    assert text.chat([{"role": "user", "content": "a"}]) == "user: a\n28 Feb 2026 assistant:"
    assert text.shown_date == "2026-02-28"
    plain = Text.load(str(model))
    assert plain.chat([{"role": "user", "content": "a"}]) == plain.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    conversation = {"messages": [{"role": "user", "content": "water"}], "max_tokens": 3}
    lines = [line(name, CHAT, **conversation) for name in "ab"]

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("harness.tokenizer.date", Then)
        assert run(model, write(tmp_path / "in", lines[:1]), output, "--reproducible") == 0
        assert run(model, write(tmp_path / "in", lines), tmp_path / "at-once", "--reproducible") == 0
    first = body(records(output)["a"])
    assert shown_date(first["system_fingerprint"]) == date(2026, 2, 28)
    assert run(model, tmp_path / "in", output, "--reproducible") == 0, "continued another day"
    assert records(output) == records(tmp_path / "at-once")
    assert run(model, tmp_path / "in", tmp_path / "today") == 0
    assert shown_date(body(records(tmp_path / "today")["a"])["system_fingerprint"]) == date.today()


class Then(date):
    """A day on which something was begun."""

    @classmethod
    def today(cls) -> date:
        return date(2026, 2, 28)


def test_a_suite_goes_on_with_its_day(
    model: Path, make_options: OptionsMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("helm.benchmark")
    (model / "chat_template.jinja").write_text(DATED)
    options = make_options(tmp_path / "out", model=str(model), run_entries=["toy_joint"], chat="on")
    CountingEngine.calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr("harness.tokenizer.date", Then)
        result = run_suite(options, CountingEngine)
    run_suite(options, CountingEngine)
    assert CountingEngine.calls == [4], "the prompts are the same another day"
    assert kept_date(result.folder.glob("policies/*/manifest.json")) == date(2026, 2, 28)


def test_lm_eval_goes_on_with_its_day(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text: Any = SimpleNamespace(today=date(2026, 3, 2))
    path, begun = str(tmp_path / "kept"), Identity("a", date="2026-03-01")
    first = kept_answers(path, begun, text, Progress())
    assert kept_answers(path, Identity("a", date="2026-03-02"), text, Progress()) == first
    assert text.today == date(2026, 3, 1)
    assert kept_answers(path, Identity("b", date="2026-03-02"), text, Progress()) != first
    assert (
        capsys.readouterr().err
        == f"answers kept at {path} are not used{since(['weights or config', 'date'])}\n"
    )


def test_a_template_without_a_date_has_none(model: Path) -> None:
    text = Text.load(str(model))
    assert text.shown_date == "" and text.dated_template() is None
    assert dataclasses.replace(Identity("a"), date="") == Identity("a")
