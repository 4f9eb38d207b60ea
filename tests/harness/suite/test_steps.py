"""A suite's steps by themselves: requests without an engine, an engine that stays its maker's, few frames."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.spec.policy import Policy
from engine.spec.request import Output, Request
from harness import cli
from harness.suite.options import open_suite
from harness.suite.policy_run import answer, open_run
from harness.suite.requests import build_requests, requests_of
from harness.suite.runner import prepare, write
from harness.suite.scoring import rows_of, score, total_of
from tests.harness.conftest import PLUGIN, OptionsMaker
from tests.support.counting_engine import CountingEngine

pytest.importorskip("helm.benchmark")

ROOT = Path(__file__).resolve().parents[3]


def test_steps_with_an_engine_of_ones_own(make_options: OptionsMaker, tmp_path: Path) -> None:
    options = make_options(tmp_path, run_entries=["toy_joint", "toy_separate"])
    CountingEngine.calls.clear()
    with CountingEngine(options.settings, Policy(name="resident")) as engine:
        for asked in (16, 0):  # the second time everything is in the journal
            with open_suite(options) as suite:
                run = open_run(suite, Policy(name="resident"), engine)
                requests = build_requests(suite, [run.deployment])
                assert len(run.missing(requests.different)) == asked
                prepare(suite, [run], requests)
                manifest, failures = score(suite, run, requests, answer(suite, run, requests))
                rows = rows_of(suite, run, requests, failures)
                totals = [total_of(run, requests, manifest)]
                shown = write(suite, rows, totals, {"resident": manifest})
            assert CountingEngine.calls == [16]
            assert [row.run_entry for row in rows] == ["toy_joint", "toy_separate"] and not failures
            assert (suite.store.folder / "table.md").read_text() == shown
        assert engine.generate([[5, 6]], 2), "it is not closed with the suite"


def test_requests_are_known_without_answers(make_options: OptionsMaker, tmp_path: Path) -> None:
    options = make_options(tmp_path, run_entries=["toy_sampling", "toy_calibrated"])
    found = requests_of(dataclasses.replace(options, suite="asked"))
    with open_suite(options) as suite, Engine(options.settings) as engine:
        run = open_run(suite, Policy(), engine)
        assert list(build_requests(suite, [run.deployment]).different.values()) == found
    assert found and not (tmp_path / "prod_env" / "model_metadata.yaml").exists()


def test_four_frames_lead_from_main_to_the_engine(
    tiny_opt_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, frames = Engine.answer, list[list[str]]()

    def observed(self: Engine, requests: list[Request], **callbacks: Any) -> list[Output]:
        ours = [frame for frame in inspect.stack() if Path(frame.filename).is_relative_to(ROOT / "harness")]
        frames.append([frame.function for frame in ours])
        return original(self, requests, **callbacks)

    monkeypatch.setattr(Engine, "answer", observed)
    command = f"run -r toy_joint --plugins {PLUGIN} --model {tiny_opt_dir} --policy resident --no-report"
    argv = [*command.split(), "-o", str(tmp_path), "--local-path", str(tmp_path / "prod_env")]
    assert cli.main(argv) == 0
    assert frames == [["answer", "run_suite", "execute", "main"]]
