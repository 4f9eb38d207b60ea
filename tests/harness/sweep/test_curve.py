"""Whole sweeps: what is reused, what is measured again, formats that fail; then the real engine."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import UsageError
from engine.spec.policy import Policy
from engine.spec.settings import EngineSettings
from harness import cli, config
from harness.commands.curve import make_options
from harness.sweep.formats import choose_formats
from harness.sweep.options import CurveOptions
from harness.sweep.runner import CurveResult, run_curve
from tests.harness.conftest import PLUGIN, with_settings
from tests.harness.sweep.curve_engine import FORMATS, RoughEngine
from tests.support.changed_models import CHANGES, end_ids, weights

pytest.importorskip("helm.benchmark")

BASE = Policy(name="resident")
WORDS = " ".join(f"word{i % 7} of {i}" for i in range(60))


@pytest.fixture(autouse=True)
def engine() -> Iterator[type[RoughEngine]]:
    yield RoughEngine
    RoughEngine.fails = RoughEngine.killed = ""
    RoughEngine.asked.clear()


@pytest.fixture
def options(tiny_opt_dir: Path, tmp_path: Path) -> CurveOptions:
    """A sweep of two formats over one toy scenario, a text and two passages."""
    (tmp_path / "text.txt").write_text(WORDS)
    passages = [{"text": "two of the words"}, {"text": "one of the answers"}]
    (tmp_path / "passages.jsonl").write_text("\n".join(map(json.dumps, passages)))
    return CurveOptions(
        settings=EngineSettings(str(tiny_opt_dir), offload_dir=tmp_path / "results" / "offload"),
        model_name="tiny-opt",
        base=BASE,
        formats=choose_formats(["w8", "w4"], FORMATS, BASE),
        suite="mine",
        output_path=tmp_path / "results",
        run_entries=["toy_generation"],
        plugins=[PLUGIN],
        answers=3,
        text=tmp_path / "text.txt",
        window=32,
        stride=8,
        text_tokens=40,
        last_word=str(tmp_path / "passages.jsonl"),
        divergence_tokens=60,
        repeats=2,
    )


def rows(result: CurveResult) -> dict[str, dict[str, Any]]:
    content = json.loads((result.folder / "curve.json").read_text())
    return {row["format"]: row for row in content["rows"]}


def policies_asked() -> set[str]:
    return {policy for policy, _ in RoughEngine.asked}


def test_a_sweep(options: CurveOptions) -> None:
    result = run_curve(options, RoughEngine)
    found = rows(result)
    assert list(found) == ["full", "w8", "w4"] and not result.failures
    assert found["full"]["kl"] is None
    assert 0 < found["w8"]["kl"] < found["w4"]["kl"] / 10, "the noise is the larger the fewer the bits"
    assert found["w4"]["text_tokens"] == 40 and found["w4"]["passages"] == 2 and found["w4"]["instances"] == 4
    assert found["w8"]["answer_nll_change"] != 0 == found["full"]["answer_nll_change"]
    assert [found[name]["largest_block"] for name in found] == [6, 0, 25]
    assert found["w4"]["weight_bits"] == pytest.approx(4.5) and found["w4"]["repeats"] == 2
    assert found["w4"]["verdict"] == "inconclusive", "four instances show nothing"
    for name in ("curve.md", "curve.csv", "points/w4.json"):
        assert (result.folder / name).is_file()
    assert (result.folder / "curve.md").read_text() == result.shown
    assert not list(result.folder.glob("reference-*")), "the logits are removed at the end"


def test_likelihoods_are_those_of_the_model(options: CurveOptions, tiny_opt_dir: Path) -> None:
    """The continuations' log-probabilities from plain transformers, one pass per window."""
    import torch
    from transformers import AutoModelForCausalLM

    from harness.sweep.items import windows
    from harness.tokenizer import Text

    result = run_curve(dataclasses.replace(options, run_entries=[], last_word=None, formats=[]), RoughEngine)
    model = AutoModelForCausalLM.from_pretrained(tiny_opt_dir, dtype=torch.float32).eval()
    total = 0.0
    items = windows(Text.load(str(tiny_opt_dir)), WORDS, 32, 8, 40)
    for item in items:
        ids = torch.tensor([item.prompt + item.forced])
        labels = ids.clone()
        labels[:, : len(item.prompt)] = -100  # as transformers' guide to perplexity masks the context
        total += model(ids, labels=labels).loss.item() * len(item.forced)
    count = sum(len(item.forced) for item in items)
    assert rows(result)["full"]["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)


def test_a_finished_sweep_asks_nothing(options: CurveOptions, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_curve(options, RoughEngine)
    RoughEngine.asked.clear()
    again = run_curve(options, RoughEngine)
    assert RoughEngine.asked == [] and again.shown == first.shown
    assert "format w4 was measured before" in capsys.readouterr().err


def test_a_killed_sweep_goes_on(options: CurveOptions) -> None:
    RoughEngine.killed = "w4"
    with pytest.raises(KeyboardInterrupt):
        run_curve(options, RoughEngine)
    points = options.folder / "points"
    assert sorted(path.name for path in points.iterdir()) == ["full.json", "w8.json"]
    assert len(list(options.folder.glob("reference-*.npy"))) == 1
    RoughEngine.killed = ""
    RoughEngine.asked.clear()
    result = run_curve(options, RoughEngine)
    before = itertools.takewhile(lambda call: call[1] > 1, RoughEngine.asked)
    assert {policy for policy, _ in before} == {"w4"}, "before the rounds of speed"
    whole = run_curve(dataclasses.replace(options, suite="whole"), RoughEngine)
    for name, row in rows(whole).items():
        same = {key: row[key] for key in ("kl", "answer_nll", "perplexity", "accuracy", "last_word_nll")}
        assert {key: rows(result)[name][key] for key in same} == same


def test_a_format_that_comes_later_is_compared_with_the_same(options: CurveOptions) -> None:
    both = rows(run_curve(options, RoughEngine))
    later = dataclasses.replace(options, suite="later", formats=options.formats[:1])
    run_curve(later, RoughEngine)
    RoughEngine.asked.clear()
    added = rows(run_curve(dataclasses.replace(later, formats=options.formats), RoughEngine))
    assert policies_asked() == {"full", "w4"}, "full precision's logits are needed again"
    assert added["w4"]["kl"] == both["w4"]["kl"]


def test_formats_take_turns_within_one_budget(options: CurveOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose free memory halves with every engine, and on which formats are added later."""
    made = 0

    def shrinking(*args: Any) -> RoughEngine:
        nonlocal made
        made += 1
        engine = RoughEngine(*args)
        engine.free = 1600 >> min(made - 1, 8)
        return engine

    same = choose_formats(["w4", "name=again,weight_quant=4"], FORMATS, BASE)
    found = rows(run_curve(dataclasses.replace(options, formats=same[:1]), shrinking))
    assert [found[name]["largest_block"] for name in found] == [6, 25]
    turns = [policy for policy, count in RoughEngine.asked if count == 1]
    assert turns == ["full", "w4", "full", "w4"], "two rounds, each over all formats"
    assert len({row["speed_began"] for row in found.values()}) == 1

    monkeypatch.setattr("harness.sweep.runner._now", lambda: "later")
    result = run_curve(dataclasses.replace(options, formats=same), shrinking)
    assert rows(result)["again"]["largest_block"] == 25, "the budget is the curve's"
    assert "token/s were measured at different times" in result.shown and "again later" in result.shown


def test_a_format_whose_speed_cannot_be_measured(options: CurveOptions) -> None:
    def failing(*args: Any) -> RoughEngine:
        if len(RoughEngine.asked) > 6 and args[1].name == "w4":
            raise UsageError("no memory is left")
        return RoughEngine(*args)

    result = run_curve(options, failing)
    assert rows(result)["w4"]["tokens_per_second"] is None and rows(result)["w8"]["repeats"] == 2
    assert result.failures == ["format w4, speed: no memory is left"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"answers": 2}, "likelihoods"),
        ({"run_entries": ["toy_generation:eval_instances=3"]}, "run entries, instances"),
        ({"base": Policy(name="resident", device_batch=2)}, "policy"),
    ],
)
def test_other_circumstances_are_measured_anew(
    options: CurveOptions, change: dict[str, Any], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_curve(options, RoughEngine)
    capsys.readouterr()
    changed = dataclasses.replace(options, **change)
    changed = dataclasses.replace(changed, formats=choose_formats(["w8", "w4"], FORMATS, changed.base))
    RoughEngine.asked.clear()
    run_curve(changed, RoughEngine)
    assert policies_asked() == {"full", "w8", "w4"}
    assert f"format w4 is measured anew, since these changed: {why}" in capsys.readouterr().err


@pytest.mark.parametrize("change", [weights, end_ids], ids=lambda change: change.__name__)
def test_a_changed_folder_is_measured_anew(
    options: CurveOptions, change: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(options.settings.model, folder)
    options = with_settings(options, model=str(folder))
    run_curve(options, RoughEngine)
    change(folder)
    RoughEngine.asked.clear()
    run_curve(options, RoughEngine)
    assert policies_asked() == {"full", "w8", "w4"}
    assert f"since these changed: {CHANGES[change][0]}" in capsys.readouterr().err


def test_another_calibration_is_measured_anew(
    options: CurveOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "statistics"
    file.write_text("one")
    formats = choose_formats(["w8", f"name=smooth,weight_quant=w8a8,calibration={file}"], FORMATS, BASE)
    options = dataclasses.replace(options, formats=formats)
    run_curve(options, RoughEngine)
    file.write_text("two")
    run_curve(options, RoughEngine)
    said = capsys.readouterr().err
    assert "format smooth is measured anew, since these changed: calibration" in said
    assert "format w8 was measured before" in said


def test_a_format_that_fails_does_not_stop_the_others(options: CurveOptions) -> None:
    RoughEngine.fails = "w8"
    result = run_curve(options, RoughEngine)
    assert list(rows(result)) == ["full", "w4"]
    assert result.failures == ["format w8: this format cannot be run here: choose another"]
    RoughEngine.fails = "full"
    with pytest.raises(UsageError, match="cannot be run here"):
        run_curve(dataclasses.replace(options, suite="none"), RoughEngine)


def test_the_reference_is_kept_where_asked(options: CurveOptions) -> None:
    result = run_curve(dataclasses.replace(options, keep_reference=True), RoughEngine)
    (path,) = result.folder.glob("reference-*.npy")
    assert np.load(path).shape == (rows(result)["w4"]["compared_tokens"], 384)


def test_nothing_to_measure(options: CurveOptions) -> None:
    with pytest.raises(UsageError, match="nothing whose likelihood could be measured"):
        run_curve(dataclasses.replace(options, run_entries=[], text=None, last_word=None), RoughEngine)


def test_without_a_divergence(options: CurveOptions) -> None:
    result = run_curve(dataclasses.replace(options, divergence_tokens=0), RoughEngine)
    assert rows(result)["w4"]["kl"] is None and "KL" not in result.shown
    assert rows(result)["w4"]["perplexity"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "w44"], "no format is called 'w44' (did you mean 'w4'?)"),
        (["--text", "none.txt"], "the text file none.txt cannot be read"),
        (["--format-file", "none.yaml"], "none.yaml cannot be read"),
        (["--accept", "2"], "'2' is not above 0 and at most 1"),
        (["--text", "short.txt", "--window", "64"], "less than a window of 63"),
        (["--last-word", "none.jsonl"], "the file of passages none.jsonl cannot be read"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    assert cli.main(["curve", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


class FakeRows(list[dict[str, str]]):
    """Rows of a data set in place of a downloaded one."""

    @property
    def column_names(self) -> list[str]:
        return ["text"]


def test_the_papers_table(tiny_opt_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's data sets, formats and figures, with substitutes for downloads."""
    import datasets

    loaded: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, split: str) -> FakeRows:
        loaded.append((name, config, split))
        return FakeRows({"text": f"{WORDS} {i}"} for i in range(3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ["curve", "--paper", "--model", str(tiny_opt_dir), "--window", "32", "-o", str(tmp_path)]
    args = config.parse(cli.build_parser, [*arguments, "--stride", "8", "--text-tokens", "16"])
    options = make_options(args)
    assert not options.run_entries and options.settings.budgets.host is None
    result = run_curve(options, RoughEngine)
    assert loaded == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("EleutherAI/lambada_openai", None, "test"),
    ]
    assert list(rows(result)) == ["full", "4-bit", "4-bit-sparse"]
    assert rows(result)["4-bit-sparse"]["attention_fraction"] == 0.1
    assert rows(result)["4-bit"]["passages"] == 3 and rows(result)["4-bit"]["text_tokens"] == 16
    assert "| opt-175b | 4-bit-sparse | published |" in result.shown
    content = json.loads((result.folder / "curve.json").read_text())
    assert {figure["kind"] for figure in content["published"]} == {"published"}


def test_the_engines_own_sweep(tmp_path: Path) -> None:
    """The real engine on the demo model: 8 bits are close, 2 bits are not, bytes are the stored ones."""
    text = tmp_path / "text.txt"
    from harness.sweep.texts import read_dataset

    text.write_text(read_dataset("demo"))
    arguments = ["curve", "--text", str(text), "--window", "96", "--text-tokens", "384", "-o", str(tmp_path)]
    formats = ["w8", "w2", "kv8", "kv2-flexgen", "kv2-token", "kv2-channel"]
    assert cli.main([*arguments, "--suite", "own", "--formats", *formats, "--speed-repeats", "1"]) == 0
    folder = tmp_path / "curves" / "own"
    content = json.loads((folder / "curve.json").read_text())
    assert {path.name for path in folder.glob("*.*g")} == {"divergence.png", "divergence.svg"}
    found = {row["format"]: row for row in content["rows"]}
    for near, far in (("w8", "w2"), ("kv8", "kv2-flexgen")):
        assert found[near]["kl"] < 1e-3 < 1e-2 < found[far]["kl"]
        assert found[near]["agreement"] > 0.99 > found[far]["agreement"]
    assert found["kv2-channel"]["kl"] < found["kv2-token"]["kl"] < found["kv2-flexgen"]["kl"]
    assert found["kv2-channel"]["kv_bits"] == pytest.approx(found["kv2-token"]["kv_bits"], rel=0.1)
    assert found["w2"]["weight_bits"] < found["w8"]["weight_bits"] < found["full"]["weight_bits"]
    assert found["kv2-flexgen"]["kv_bits"] == pytest.approx(2.5, rel=0.01)
    assert found["kv8"]["largest_block"] > found["full"]["largest_block"] > 0
