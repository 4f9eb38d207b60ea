"""Rows, tables, pictures and the gate's file, from made-up points."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest

from engine.errors import PolicyError, UsageError
from engine.spec.policy import Policy
from harness.report.plots.bits import write_curve
from harness.statistics import Verdict
from harness.suite.gate import accepted_formats, check_accepted
from harness.sweep import table as curve_table
from harness.sweep.points import Point, read_point, write_point
from harness.sweep.rows import FormatRow, make_rows
from tests.harness.sweep.curve_engine import FORMATS, made_up_points

POINTS = made_up_points()
ROWS = make_rows(POINTS, accept=0.99)


def row(name: str) -> FormatRow:
    return next(row for row in ROWS if row.format == name)


def test_rows_hold_what_was_measured() -> None:
    full, w2 = row("full"), row("w2")
    assert full.verdict is Verdict.REFERENCE and full.change == 0
    assert w2.accuracy == pytest.approx(0.54, abs=0.04) and w2.instances == 1000
    assert w2.accuracy_low is not None and w2.accuracy_low < w2.accuracy < (w2.accuracy_high or 0)
    assert w2.change == pytest.approx(w2.accuracy - (full.accuracy or 0))
    assert (w2.tokens_per_second, w2.slowest, w2.fastest) == (100, 90, 110)
    assert w2.answer_nll_change == pytest.approx(0.1), "0.4 nats over 4 tokens"
    assert w2.perplexity == pytest.approx(3 * math.exp(0.4))
    assert w2.text_bits_per_token == pytest.approx((math.log(3) + 0.4) / math.log(2))
    assert (w2.last_word_accuracy, w2.last_word_nll) == (0.5, 1.5)


def test_bits_are_those_stored() -> None:
    both, full = row("both"), row("full")
    assert (both.weight_bits, both.kv_bits, both.bits) == pytest.approx((4.5, 4.5, 4.5))
    tokens = 4 * 544
    assert full.bits == pytest.approx((16 * 1_000_000 + 32 * 64 * tokens) / (1_000_000 + 64 * tokens))
    assert both.bytes_per_parameter == pytest.approx(4.5 / 8)


def test_the_gate_marks_the_cheapest_that_is_accepted() -> None:
    verdicts = {r.format: r.verdict for r in ROWS}
    assert verdicts["w8"] is Verdict.ACCEPTED
    assert verdicts["w2"] is verdicts["kv2"] is Verdict.REJECTED
    assert verdicts["both"] is not Verdict.ACCEPTED
    (cheapest,) = (r for r in ROWS if r.cheapest)
    assert cheapest.bits == min(r.bits for r in ROWS if r.verdict is Verdict.ACCEPTED)


def test_few_instances_accept_nothing() -> None:
    rows = make_rows(made_up_points(instances=40), accept=0.99)
    assert {r.verdict for r in rows} <= {Verdict.REFERENCE, Verdict.INCONCLUSIVE, Verdict.REJECTED}
    assert not any(r.cheapest for r in rows)
    assert "none, the instances do not show it" in curve_table.to_markdown(rows, POINTS, 0.99, False)


def test_other_instances_are_refused() -> None:
    entry = dataclasses.replace(POINTS[1].entries[0], values={"id0": 1.0})
    with pytest.raises(UsageError, match="w8 answered other instances than full"):
        make_rows([POINTS[0], dataclasses.replace(POINTS[1], entries=[entry])], 0.99)


def test_without_run_entries_nothing_is_said_of_accuracy() -> None:
    points = [dataclasses.replace(point, entries=[]) for point in POINTS]
    rows = make_rows(points, 0.99)
    assert all(r.accuracy is None and r.verdict is not Verdict.ACCEPTED for r in rows)
    assert "Gate" not in curve_table.to_markdown(rows, points, 0.99, False)


def test_conditions_that_differ_are_said() -> None:
    def shown(**changes: object) -> str:
        points = [POINTS[0], dataclasses.replace(POINTS[1], speed=dataclasses.replace(speed, **changes))]
        return curve_table.to_markdown(make_rows(points, 0.99), points, 0.99, False)

    speed = POINTS[1].speed
    assert speed is not None
    assert "different times" not in shown() and "kept cores busy" not in shown(others=[0.1, 0.0, 0.1])
    assert "different times" in shown(began="2026-02-03T04:05:06+00:00")
    assert "at most: w8 1.4" in shown(others=[0.1, 1.4, 0.2])
    limited = dataclasses.replace(POINTS[0].storage, limits={"host": 3 << 30})
    points = [dataclasses.replace(POINTS[0], storage=limited, speed=None), *POINTS[1:]]
    text = curve_table.to_markdown(make_rows(points, 0.99), points, 0.99, False)
    assert "within 3.00 GiB of host memory" in text


def test_markdown_is_a_table_of_equal_lines() -> None:
    shown = curve_table.to_markdown(ROWS, POINTS, 0.99, True)
    for table in re.findall(r"(?:^\|.*\n)+", shown, re.MULTILINE):
        assert len({len(line) for line in table.splitlines()}) == 1
    assert "accepted, cheapest" in shown
    assert re.search(r"\| opt-30b +\| 4-bit +\| published \| +0\.724 \| +12\.90 \|", shown)
    assert re.search(r"\| model +\| w2 +\| measured +\|", shown)
    assert "4-column" in shown, "FlexGen's weights are named by their format"


def test_csv_reads_back() -> None:
    read = list(csv.DictReader(io.StringIO(curve_table.to_csv(ROWS))))
    assert [r["format"] for r in read] == [r.format for r in ROWS]
    assert float(read[1]["accuracy"]) == ROWS[1].accuracy
    assert {r["kind"] for r in read} == {"measured"}


def test_json_is_strict_and_says_what_it_is() -> None:
    content = curve_table.to_json("mine", ROWS, POINTS, 0.99, True)
    read = json.loads(json.dumps(content, allow_nan=False))
    assert read["rows"][1]["policy"]["weight_quant"] == "8" and read["rows"][1]["model"]["digest"]
    assert read["kind"] == "measured" and {figure["kind"] for figure in read["published"]} == {"published"}
    assert [entry["entry"] for entry in read["rows"][0]["entries"]] == ["task", "words"]


def test_points_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "w2.json"
    point = next(point for point in POINTS if point.name == "w2")
    write_point(path, point)
    read = read_point(path)
    assert read is not None and make_rows([POINTS[0], read], 0.99) == make_rows([POINTS[0], point], 0.99)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0'))
    assert read_point(path) is None and read_point(tmp_path / "none.json") is None


def test_a_stale_point_says_why() -> None:
    point: Point = POINTS[1]
    assert point.stale({**point.policy, "name": "other"}, point.asked) == ""
    assert point.stale(point.policy, {"model": "sha256:two", "seed": 0}) == "model"
    assert (
        point.stale({**point.policy, "kv": "0/1/0"}, {**point.asked, "run_entries": []})
        == "run entries, policy"
    )


def curve_file(tmp_path: Path) -> Path:
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(curve_table.to_json("mine", ROWS, POINTS, 0.99, False)))
    return path


def test_accepted_formats_are_read(tmp_path: Path) -> None:
    found = accepted_formats(curve_file(tmp_path), "sha256:one")
    accepted = sorted((r for r in ROWS if r.verdict is Verdict.ACCEPTED), key=lambda r: r.bits)
    assert [(key.weight_quant, key.kv_quant) for key in found] == [
        (r.weight_quant, r.kv_quant) for r in accepted
    ]


def test_a_policy_is_held_to_the_gate(tmp_path: Path) -> None:
    path = curve_file(tmp_path)
    check_accepted(FORMATS["w8"].replace(name="other", device_batch=1), path)
    check_accepted(Policy(), path)
    with pytest.raises(
        PolicyError, match=r"'w2' compresses by weight_quant=2, .*accepted are .*weight_quant=8"
    ):
        check_accepted(FORMATS["w2"], path)
    with pytest.raises(PolicyError, match="does not accept"):
        check_accepted(Policy(attention_fraction=0.1), path)
    with pytest.raises(PolicyError, match=r"matmul_precision=medium, which .* does not accept"):
        check_accepted(Policy.parse("matmul_precision=medium"), path)


def test_a_row_that_lacks_a_key_of_its_format_is_none(tmp_path: Path) -> None:
    path = curve_file(tmp_path)
    content = json.loads(path.read_text())
    for row in content["rows"]:
        del row["matmul_precision"]
    path.write_text(json.dumps(content))
    with pytest.raises(PolicyError, match="is no curve: make one"):
        check_accepted(FORMATS["w8"], path)


def test_a_calibration_is_part_of_a_format(tmp_path: Path) -> None:
    calibrated = Policy.parse(f"name=smooth,weight_quant=w8a8,calibration={tmp_path}/statistics.safetensors")
    policy = calibrated.to_dict()
    smooth = dataclasses.replace(POINTS[1], name="smooth", policy=policy)
    points, path = [POINTS[0], smooth], tmp_path / "curve.json"
    content = curve_table.to_json("mine", make_rows(points, 0.99), points, 0.99, False)
    path.write_text(json.dumps(content))
    check_accepted(calibrated, path)
    with pytest.raises(PolicyError, match="does not accept"):
        check_accepted(Policy.parse("weight_quant=w8a8"), path)


def test_a_gate_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="is no curve: make one"):
        check_accepted(FORMATS["w8"], tmp_path / "none.json")
    with pytest.raises(PolicyError, match="the curve of another model"):
        check_accepted(FORMATS["w8"], curve_file(tmp_path), "sha256:two")


def test_pictures_are_written_and_name_every_format(tmp_path: Path) -> None:
    curve_file(tmp_path)
    written = write_curve(tmp_path)
    assert sorted(path.name for path in written) == [
        "accuracy_bits.png", "accuracy_bits.svg", "divergence.png", "divergence.svg",
    ]  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in written)
    svg = (tmp_path / "accuracy_bits.svg").read_text()
    assert all(f">{r.format}</text>" in svg for r in ROWS if r.format != "full")
    before = svg
    write_curve(tmp_path)
    assert (tmp_path / "accuracy_bits.svg").read_text() == before, "the same rows give the same bytes"


def test_names_lie_apart() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from harness.report.plots.labels import place_labels

    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    spots = [(1, 1), (1.01, 1), (1, 1.01), (2, 2), (2, 1), (1.5, 1.001), (1.02, 1.02)]
    for x, y in spots:
        axes.plot([x], [y], "o")
    place_labels(figure, axes, [f"format {i}" for i in range(len(spots))], color="black", leader="grey")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    assert len(boxes) == len(spots)
    points = [axes.transData.transform(spot) for spot in spots]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert not any(box.contains(*point) for point in points)
