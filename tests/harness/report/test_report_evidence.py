"""Paired comparisons, single requests, bits and other systems in the report agree with stored results."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UsageError
from harness.report.analysis.bits import of_suite, read_curve
from harness.report.analysis.findings import findings
from harness.report.analysis.frontier import standings
from harness.report.analysis.pairs import ALL, compare, disagreements, read_values
from harness.report.analysis.published import read_published
from harness.report.analysis.systems import read_systems
from harness.report.evidence import Evidence, gather
from harness.report.inputs.data import merge
from harness.report.inputs.reading import read_suite
from harness.report.sections import make_content
from harness.report.write import Report, write_report
from harness.report.write import markdown as report_markdown

FIXTURE = Path(__file__).parent / "fixtures" / "report_results"
OLD = Path(__file__).parent / "fixtures" / "report_suite"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of stored results that a test may change."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "results"))


def change(path: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def right(folder: Path) -> dict[str, float]:
    """Exact match by instance, straight from HELM's file."""
    stored = json.loads((folder / "per_instance_stats.json").read_text())
    return {
        entry["instance_id"]: stat["mean"]
        for entry in stored
        for stat in entry["stats"]
        if stat["name"]["name"] == "exact_match"
    }


def test_pairs_count_what_helm_stored() -> None:
    suite = read_suite(FIXTURE / "runs" / "small")
    found = compare(suite, read_values(suite))
    folders = {(r.run_entry, r.policy): r.folder for r in suite.results}
    assert [p.entry for p in found] == [ALL, *suite.run_entries]
    for paired in found[1:]:
        one, other = (right(folders[paired.entry, name] or Path()) for name in ("resident", "packed"))
        assert paired.instances == len(one) == 12
        assert paired.only_left == sum(one[key] > other[key] for key in one)
        assert paired.only_right == sum(one[key] < other[key] for key in one)
    whole = found[0]
    assert whole.only_left == sum(p.only_left or 0 for p in found[1:]) and whole.instances == 36
    values = {r.policy: [] for r in suite.results}  # type: dict[str, list[float]]
    for r in suite.results:
        values[r.policy].append(r.value or 0)
    assert whole.change.value == pytest.approx(sum(values["packed"]) / 3 - sum(values["resident"]) / 3)


def test_requests_shown_are_those_that_differ() -> None:
    suite = read_suite(FIXTURE / "runs" / "small")
    (pair,) = disagreements(suite, read_values(suite), most=5)
    assert pair.compared == 36 and len(pair.shown) == 5 < pair.differing
    (everything,) = disagreements(suite, read_values(suite), most=1000)
    assert len(everything.shown) == everything.differing == pair.differing
    for item in everything.shown:
        assert item.left.answer != item.right.answer and item.left.instance == item.right.instance
        assert item.left.question in item.left.prompt and item.left.correct
    assert all(item.left_value != item.right_value for item in pair.shown), (
        "what is scored otherwise comes first"
    )


def test_dominated_policies_are_found() -> None:
    suite = read_suite(OLD)
    by_name = {s.policy: s for s in standings(findings(suite))}
    fastest = max(suite.policies, key=lambda p: p.total_per_second or 0)
    assert by_name[fastest.name].dominated_by is None
    for standing in by_name.values():
        if standing.dominated_by:
            other = by_name[standing.dominated_by]
            assert other.rate and standing.rate and other.accuracy and standing.accuracy
            assert other.rate >= standing.rate and other.accuracy.value >= standing.accuracy.value


def test_latency_is_that_of_the_stored_requests() -> None:
    suite = read_suite(FIXTURE / "runs" / "small")
    seconds = [
        state["result"]["batch_request_time"]
        for path in (FIXTURE / "runs" / "small").glob("*_resident/scenario_state.json")
        for state in json.loads(path.read_text())["request_states"]
    ]
    resident = standings(findings(suite))[0]
    assert resident.latency == pytest.approx(sorted(seconds)[len(seconds) // 2], rel=0.3)
    assert resident.slow_latency is not None and min(seconds) < resident.slow_latency <= max(seconds)


def test_bits_of_curve_and_policies() -> None:
    curve = read_curve(FIXTURE / "curves" / "small" / "curve.json")
    assert curve is not None and curve.reference.series is None
    assert {p.name: p.series for p in curve.points}["w4kv4"] == "both"
    assert all(p.kl is not None and p.perplexity is not None for p in curve.points[1:])
    own = of_suite(findings(read_suite(FIXTURE / "runs" / "small")))
    assert own is not None and [p.name for p in own.points] == ["resident", "packed"]
    packed = own.points[1]
    assert packed.series == "both" and packed.kv_bits == 4.5
    assert packed.weight_bits and packed.kv_bits < (packed.bits or 0) < packed.weight_bits
    old = of_suite(findings(read_suite(OLD)))
    assert old is not None and old.points[1].weight_bits == 4.5, "before formats had names"
    assert read_curve(FIXTURE / "none.json") is None


def test_ratios_pair_repeats_at_equal_bits() -> None:
    systems = read_systems(FIXTURE / "comparisons" / "half-ram")
    ratios = {(a.setting, a.theirs.system): a for a in systems.ratios}
    assert set(ratios) == {
        ("all in RAM", "transformers"),
        ("all in RAM", "llama-cpp"),
        ("RAM capped at 50% (128 MiB)", "accelerate"),
    }
    ratio = ratios["all in RAM", "transformers"].ratio
    assert (ratio.least, ratio.median, ratio.most) == pytest.approx((40.1 / 39.4, 41.2 / 38.9, 42.3 / 37.2))
    outcomes = {s.system: s.outcome for s in systems.systems if s.outcome != "ok"}
    assert outcomes == {
        "transformers": "out_of_memory: killed at 128 MiB while loading",
        "petals": "figure of its paper, other hardware",
    }


def test_published_figures_of_different_models_stay_apart(results: Path) -> None:
    path = results / "comparisons" / "half-ram" / "comparison.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    (published,) = [row for row in rows if row["kind"] == "published"]
    added = {**published, "model": "other", "generated_tokens_per_s": "0.01"}
    with path.open("a", newline="") as file:
        csv.DictWriter(file, list(rows[0])).writerow(added)
    found = [system for system in read_systems(path.parent).systems if system.kind == "published"]
    assert [len(system.rates) for system in found] == [1, 1], "a median over models says nothing"
    assert found[1].setting.startswith("other, ")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of all stored results."""
    return write_report(FIXTURE, ["small"], tmp_path_factory.mktemp("report"), ["half-ram"])


def test_report_has_every_section_that_results_allow(report: Report) -> None:
    page, markdown = report.html.read_text(), report.markdown.read_text()
    for title in (
        "Is the difference real?", "Accuracy against bits", "Speed against accuracy", "Where the time went",
        "Ours against other offloaders", "The paper&#39;s tables beside ours", "Disagreements",
    ):  # fmt: skip
        assert f"<h2>{title}</h2>" in page
    assert "<h3>Accuracy on run entries, comparison half-ram</h3>" in page
    assert "killed at 128 MiB while loading" in page and "Sheng et al., FlexGen" in markdown
    assert {path.name for path in report.pictures} >= {
        "differences.svg", "bits-accuracy.svg", "bits-distances.svg", "frontier.svg", "latency.svg",
        "ratios.svg",
    }  # fmt: skip


def test_every_figure_is_in_the_tables(report: Report) -> None:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(report.parquet).to_pylist()
    assert len(rows) == len(report.csv.read_text().splitlines()) - 1
    table = json.loads((FIXTURE / "runs" / "small" / "table.json").read_text())
    found = {(r["policy"], r["run_entry"], r["figure"]): r for r in rows if r["section"] == "accuracy"}
    for row in table["rows"]:
        stored = found[row["policy"], row["run_entry"], row["metric"]]
        assert (stored["value"], stored["low"], stored["high"]) == (row["accuracy"], row["low"], row["high"])
        assert stored["instances"] == 12 and stored["kind"] == "measured"
    assert {r["section"] for r in rows} >= {
        "throughput",
        "streams",
        "memory",
        "placement",
        "paired",
        "bits",
        "comparison",
    }


def test_several_suites_stand_side_by_side(results: Path) -> None:
    shutil.copytree(OLD, results / "runs" / "old")
    read = [replace(read_suite(results / "runs" / name), suite=name) for name in ("small", "old")]
    merged = findings(merge(read))
    markdown = report_markdown(make_content(merged, gather(merged, results, ["small", "old"])))
    assert "do not compare their throughput" in markdown, "they ran on different machines"
    assert "`small/packed`" in markdown and "`old/offloaded-4bit`" in markdown


def test_what_an_engine_does_not_know_is_said_so(results: Path, tmp_path: Path) -> None:
    """An engine in place of ours may record nothing but its answers, and its trace may be lost."""

    def forget(manifest: Any) -> None:
        engine = manifest["engine"]
        for key in ("process", "stored", "weights_from", "disk_io"):
            engine.pop(key)
        engine.update(placement={}, streams={}, software={}, hardware={"device": "cpu"})

    for path in results.glob("runs/small/policies/*/manifest.json"):
        change(path, forget)
        path.with_name("trace.json").unlink()
    for path in results.glob("runs/small/*/scenario_state.json"):
        path.unlink()

    def lose(table: Any) -> None:
        for row in table["rows"]:
            row.update(low=math.nan, high=math.nan, run_name="")

    change(results / "runs" / "small" / "table.json", lose)
    report = write_report(results, ["small"], tmp_path / "out")
    page = report.html.read_text()
    assert page.count("not recorded") > 10
    assert "Disagreements" not in page and "Is the difference real" not in page


def test_curve_or_comparison_alone(results: Path, tmp_path: Path) -> None:
    shutil.rmtree(results / "runs")
    report = write_report(results, ["small"], tmp_path / "one")
    assert "<h2>Accuracy against bits</h2>" in report.html.read_text()
    report = write_report(results, [], tmp_path / "two", ["half-ram"])
    assert "<h2>Ours against other offloaders</h2>" in report.html.read_text()
    with pytest.raises(UsageError, match=r"no finished suite: first run_helm\.py run"):
        write_report(results, ["none"], tmp_path / "three")
    with pytest.raises(UsageError, match=r"first run_helm\.py compare"):
        write_report(results, [], tmp_path / "three", ["none"])


def test_predictions_stand_beside_what_was_measured(results: Path) -> None:
    path = results / "runs" / "small" / "policies" / "packed" / "manifest.json"
    expected = {
        "policy": {"name": "auto", "device_batch": 8},
        "predicted": {"kind": "simulated", "seconds": 2.0, "streams": {"compute": 0.5}},
        "memory": {"host": {"planned": 1 << 20}},
        "profile": "here",
    }
    change(path, lambda m: m["engine"].update(predicted=expected))
    content = make_content(findings(read_suite(results / "runs" / "small")), Evidence())
    section = next(s for s in content.sections if s.title == "Predicted against measured")
    rows = {row[1]: row for row in section.tables[0].rows}
    engine = json.loads(path.read_text())["engine"]
    assert set(rows) == {"seconds", "streams, compute", "memory, host, planned"}, (
        "the policy is no prediction"
    )
    assert rows["seconds"][4] == f"{engine['totals']['seconds'] / 2:.2f}×"
    busy = engine["streams"]["compute"]["busy_seconds"]
    assert rows["streams, compute"][4] == f"{busy / 0.5:.2f}×"
    assert rows["memory, host, planned"][2] == "1.00 MiB"


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "state of another shape": (
        "scenario_state.json",
        lambda d: next(d.glob("runs/small/*_packed/scenario_state.json")).write_text(
            '{"request_states": [{}]}'
        ),
    ),
    "instances of another shape": (
        "per_instance_stats.json",
        lambda d: next(d.glob("runs/small/*_packed/per_instance_stats.json")).write_text('[{"stats": 3}]'),
    ),
    "curve without rows": (
        "curve.json",
        lambda d: change(d / "curves" / "small" / "curve.json", lambda c: c.pop("rows")),
    ),
    "table of the paper": (
        "table_accuracy.json",
        lambda d: change(d / "paper" / "table_accuracy.json", lambda t: t["rows"].append([1])),
    ),
    "comparison without columns": (
        "half-ram",
        lambda d: (d / "comparisons" / "half-ram" / "comparison.csv").write_text("system\nours\n"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_in_one_line(results: Path, tmp_path: Path, damage: str) -> None:
    named, harm = DAMAGES[damage]
    harm(results)
    with pytest.raises(UsageError, match=re.escape(named)) as refusal:
        write_report(results, ["small"], tmp_path / "out", ["half-ram"])
    assert "\n" not in str(refusal.value) and not (tmp_path / "out").exists()


def test_parquet_and_csv_of_a_comparison_read_alike(results: Path) -> None:
    import pandas as pd

    folder = results / "comparisons" / "half-ram"
    before = read_systems(folder)
    frame = pd.read_csv(folder / "comparison.csv").convert_dtypes()
    frame.to_parquet(folder / "comparison.parquet", index=False)
    (folder / "comparison.csv").unlink()
    after = read_systems(folder)
    assert [(s.name, s.setting, s.bits, s.outcome, s.rates) for s in after.systems] == [
        (s.name, s.setting, s.bits, s.outcome, s.rates) for s in before.systems
    ]
    assert len(after.entries) == len(before.entries) == 2


def test_tables_of_the_paper_may_be_rows_that_name_their_table(tmp_path: Path) -> None:
    rows = [
        {"table": "throughput", "system": "a", "published": 1.5, "note": "n", "simulated": None},
        {"table": "throughput", "system": "b", "published": 20, "note": "", "simulated": 21.25},
        {"table": "cost", "system": "a", "published": 3.0, "policy": ""},
    ]
    (tmp_path / "paper.json").write_text(json.dumps({"kind": "simulated", "rows": rows}))
    one, other = (published.table for published in read_published(tmp_path))
    assert (one.title, other.title) == ("throughput (simulated)", "cost")
    assert one.columns == ("system", "published", "simulated") and other.columns == ("system", "published")
    assert one.rows == (("a", "1.5", "–"), ("b", "20", "21.25")) and one.names == 1
