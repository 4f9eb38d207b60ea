"""All of the paper's figures are there, and the simulations beside them are as close as documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import ProfileError
from engine.planner import find_profile
from harness import cli
from harness.commands import paper as command
from harness.throughput.paper import error_of, is_cell, read_published, setting, simulate_rows, to_json


def test_eighteen_cells_within_the_bar() -> None:
    rows = simulate_rows(read_published(), find_profile("t4"), plan=False)
    cells = [row for row in rows if is_cell(row)]
    assert len(cells) == 18 and all(row.source for row in rows)
    assert error_of(cells) <= 0.20
    assert max(max(row.ratio or 9, 1 / (row.ratio or 9)) for row in cells) < 1.35
    helm = [row for row in rows if row.table == "helm"]
    assert all(row.published and row.simulated and row.simulated < row.published for row in helm)
    ablation = {(row.system, row.model): row.simulated for row in rows if row.table == "ablation"}
    assert ablation["no_disk", "opt-175b"] is None
    for model in ("opt-30b", "opt-175b"):
        speeds = [ablation[name, model] or 0 for name in ("all", "no_policy_search", "deepspeed_policy")]
        assert speeds == sorted(speeds, reverse=True)


def test_a_planned_cell_is_at_least_as_fast() -> None:
    rows = [
        row for row in read_published() if is_cell(row) and (row.model, row.prompt) == ("opt-6.7b", "512")
    ]
    found = simulate_rows(rows[:1], find_profile("t4"), plan=True)
    content = to_json(found, find_profile("t4"))
    assert content["planner_at_least_as_fast"] == 1 and found[0].policy


def test_settings() -> None:
    run = setting("48x3 20/80 0/100 0/100 cpu_attention", 512, 32)
    assert run is not None and run.host_attention and run.overlap
    assert str(run.policy.weights) == "0.2/0.8/0" and run.policy.block_size == 144
    assert setting("4x1 disk", 512, 32) is None


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["paper", "--no-plan", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| flexgen | opt-175b | 512/32 | 0.69 token/s |" in printed
    assert (tmp_path / "paper.svg").read_text().startswith("<?xml")
    assert "## data wrangling" in (tmp_path / "paper.md").read_text()
    content = json.loads((tmp_path / "paper.json").read_text())
    assert content["cells"] == 18 and content["kind"] == "simulated"
    with pytest.raises(ProfileError, match="t5"):
        args = cli.build_parser().parse_args(["paper", "--profile", "t5"])
        command.execute(args)
