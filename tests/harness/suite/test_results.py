"""Scores, intervals, tables and files, without HELM's code and without an engine."""

from __future__ import annotations

import io
import json
import math
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from engine.errors import StorageError, UsageError
from engine.files.whole import write_whole
from engine.plan.paper.named import opt_spec
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.record import EngineRecord, StreamRecord, TierRecord, TotalsRecord
from engine.spec.request import CallProgress, Output
from engine.spec.settings import EngineSettings
from harness.files import HELM_FILES, SuiteStore, read_json, write_json
from harness.helm.registry import make_deployment, slug, write_prod_env
from harness.identity import Identity
from harness.progress.line import Progress
from harness.statistics import wilson
from harness.suite.journal import Answer
from harness.suite.manifest import Manifest, kept_date, make_manifest, read_manifest, unfinished
from harness.suite.score import Score, read_score
from harness.suite.table import SuiteTable, make_row, make_total, to_markdown
from harness.text_table import markdown_table
from harness.tokenizer import Text
from tests.support.records import make_record

NAMES_OF_NO_FOLDER = [
    "", " ", " a", "a/b", "a\\b", "..", ".hidden", "-q", "a\nb", "\x1b[31mred", "a\u202eb", "\u200b",
    "a" * 151,
]  # fmt: skip


def write_run(folder: Path, stats: list[dict[str, float]], method: str = "generation") -> Path:
    """A run's folder with the named stats, one mapping per instance."""
    folder.mkdir()
    instances = [
        {
            "instance_id": f"id{i}",
            "stats": [{"name": {"name": name}, "mean": mean} for name, mean in values.items()],
        }
        for i, values in enumerate(stats)
    ]
    instances.append({"instance_id": "id0", "perturbation": {"name": "typos"}, "stats": [
        {"name": {"name": "exact_match"}, "mean": 0.0}]})  # fmt: skip
    (folder / "per_instance_stats.json").write_text(json.dumps(instances))
    (folder / "run_spec.json").write_text(json.dumps({"adapter_spec": {"method": method}}))
    return folder


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (5, 10, 0.2366, 0.7634)],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    """81 of 263 is the worked example of Newcombe (1998), method 3; the others are textbook values."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_zeros_and_ones_have_a_wilson_interval(tmp_path: Path) -> None:
    score = read_score(
        write_run(tmp_path / "run", [{"num_bytes": 3, "exact_match": i % 2} for i in range(10)])
    )
    assert (score.metric, score.value, score.interval, score.instances) == ("exact_match", 0.5, "wilson", 10)
    assert (score.low, score.high) == pytest.approx(wilson(5, 10))


def test_fractions_have_a_bootstrap_interval(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [{"f1_score": value} for value in (0.2, 0.4, 0.6, 0.8)])
    score = read_score(folder)
    assert (score.metric, score.interval) == ("f1_score", "bootstrap")
    assert score.value == pytest.approx(0.5) and 0.2 <= score.low < 0.5 < score.high <= 0.8
    assert read_score(folder) == score


def test_a_metric_of_ones_own_is_found_behind_housekeeping(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"num_references": 1, "logprob": -2.0, "fields_right": 0.25}] * 3)
    assert (read_score(run).metric, read_score(run).value) == ("fields_right", 0.25)


def test_language_modeling_is_measured_in_bits_per_byte(tmp_path: Path) -> None:
    texts = [{"logprob": -7.0, "num_bytes": 10.0}, {"logprob": -3.0, "num_bytes": 30.0}]
    score = read_score(write_run(tmp_path / "run", texts, method="language_modeling"))
    assert score.metric == "bits_per_byte"
    assert score.value == pytest.approx(10 / 40 / math.log(2))
    assert score.low == pytest.approx(3 / 30 / math.log(2)) and score.high == pytest.approx(
        7 / 10 / math.log(2)
    )


def test_a_run_without_metrics_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no metric"):
        read_score(write_run(tmp_path / "run", [{"num_bytes": 1}], method="generation"))


def row(policy: str = "resident", metric: str = "exact_match", generated: int = 2) -> Any:
    tokens = (1,) * generated
    answers = [Answer(Output(tokens, (-1.0,) * generated, None, "stop", 4, 2.0), 10)] * 3
    score = Score(metric, 0.5, 0.25, 0.75, "wilson", 3)
    return make_row("entry", f"entry:model={policy}", policy, "demo", score, answers)


def test_throughput_is_tokens_by_shares() -> None:
    made = row()
    assert (made.requests, made.prompt_tokens, made.generated_tokens) == (3, 30, 6)
    assert made.seconds == pytest.approx(1.5)
    assert made.generated_per_second == pytest.approx(4) and made.total_per_second == pytest.approx(24)


def test_the_table_is_aligned_markdown() -> None:
    peaks = {"resident": {"device": 2048, "host": 0, "disk": 0}, "disk": {"device": 1, "host": 2, "disk": 3}}
    rows = [row(), row("disk", "bits_per_byte", generated=0)]
    answers = [Answer(Output((1, 2), (-1.0,) * 2, None, "stop", 4, 2.0), 10)] * 5
    totals = [make_total("resident", answers, 1.25, 3 << 20), make_total("disk", [], 0.0, None)]
    shown = to_markdown(rows, peaks, totals)
    tables = [part.splitlines() for part in shown.split("\n\n") if part.startswith("|")]
    assert [len(table) for table in tables] == [4, 4, 4]
    assert all(len({len(line) for line in table}) == 1 for table in tables)
    assert re.search(r"\| resident +\| +5 \| +1\.25 s \| +2\.50 s \| +4\.0 \| +24\.0 \|", shown)
    assert re.search(r"\| resident +\| 2\.00 KiB \| +0 B \| +0 B \| +3\.00 MiB \|", shown)
    assert "whole suite" not in to_markdown(rows, peaks)
    assert "0.500 bits_per_byte" in shown and "2.00 KiB" in shown and "less is better" in shown
    assert SuiteTable("s", [row()], peaks).to_json()["rows"][0]["kind"] == "measured"


def test_a_table_shows_nothing_that_moves_the_cursor_or_opens_a_column() -> None:
    head, rule, row = markdown_table([("name", "value"), ("a\x1b[31m|b\u202ec\n", "1\\|2")], 1, padded=False)
    assert row == "| a\ufffd[31m\\|b\ufffdc  | 1\\|2 |" and head.count("|") == rule.count("|") == 3


def record(peak: int) -> EngineRecord:
    return make_record(memory={tier.value: TierRecord(None, 0, peak) for tier in Tier})


def test_a_manifest_keeps_the_record_of_when_the_engine_ran() -> None:
    def make(identity: str, peak: int, before: Manifest | None, ran: bool) -> Manifest:
        return make_manifest("s", "p", Identity(identity), ["e"], 0, record(peak)).continuing(before, ran)

    first = make("a", 5, None, True).with_run("run", "digest", "files")
    idle = make("a", 0, first, False)
    assert idle.engine == record(5) and idle.earlier_sessions == [] and idle.runs == {"run": "digest"}
    assert idle.files == {"run": "files"}
    second = make("a", 3, idle, True)
    assert second.engine == record(3) and second.earlier_sessions == [record(5)]
    assert second.peak_bytes == {"device": 5, "host": 5, "disk": 5} and second.runs == {"run": "digest"}
    other = make("b", 1, second, True)
    assert other.earlier_sessions == [] and other.runs == {}
    parts = {short: parts["weights"] for short, parts in other.identities.items()}
    assert parts == {Identity(name).short: name for name in "ab"}, "the journal holds answers of both"


@pytest.mark.parametrize(
    "damage", [{"engine": {}}, {"earlier_sessions": 3}, {"runs": []}, {"identity": None}, None]
)
def test_a_manifest_of_another_shape_counts_as_none(tmp_path: Path, damage: dict[str, Any] | None) -> None:
    good = make_manifest("s", "p", Identity("model"), ["e"], 0, record(1))
    path = tmp_path / "manifest.json"
    write_json(path, good.to_json())
    assert read_manifest(path) == Manifest.from_json(json.loads(json.dumps(good.to_json())))
    assert read_manifest(path).to_json()["engine"] == good.engine.to_json()  # type: ignore[union-attr]
    write_json(path, good.to_json() | (damage or {"schema": "1"}))
    assert read_manifest(path) is None is read_manifest(tmp_path / "nowhere.json")


def test_a_suite_keeps_the_day_on_which_it_began(tmp_path: Path) -> None:
    for name, day in {"a": "2026-03-02", "b": "2026-03-01", "c": ""}.items():
        made = make_manifest("s", "p", Identity("model", date=day), ["e"], 0, record(1))
        write_json(tmp_path / name, made.to_json())
    assert kept_date(tmp_path.iterdir()) == date(2026, 3, 1)
    assert kept_date([tmp_path / "c", tmp_path / "none"]) is None


def test_a_record_in_the_middle_of_a_call_counts_what_is_done() -> None:
    before = make_record(
        totals=TotalsRecord(0, 0, 0, 0, 0.0, load_seconds=3.0),
        streams={"compute": StreamRecord(busy_seconds=1.0, share=0.0, bytes=5)},
    )
    state = CallProgress(
        finished=2, total=9, passes=4, generated_tokens=6, prompt_tokens=7, seconds=2.0, eta_seconds=1.0
    )
    made = unfinished(before, state)
    assert made.totals == TotalsRecord(
        requests=2, passes=4, prompt_tokens=7, generated_tokens=6, seconds=2.0, load_seconds=3.0
    )
    assert made.streams == {"compute": StreamRecord(busy_seconds=1.0, share=0.5, bytes=5)}
    assert made.kind == "measured" and made.model == before.model


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "file.json", {"a": 1})
    assert read_json(tmp_path / "deep" / "file.json") == {"a": 1}
    with pytest.raises(StorageError, match="cannot write"):
        write_whole(tmp_path / "deep" / "file.json" / "below", "")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.json"]
    (tmp_path / "damaged.json").write_text('{"a": ')
    assert read_json(tmp_path / "damaged.json") is None is read_json(tmp_path / "nowhere.json")


def test_a_run_appears_when_it_is_complete(tmp_path: Path) -> None:
    store = SuiteStore(tmp_path, "suite")
    digests = set()
    for content in ("old", "new"):
        (store.staging / "run").mkdir(parents=True)
        for name in HELM_FILES:
            (store.staging / "run" / name).write_text(content)
        digest = store.publish("run")
        assert (store.run("run") / "stats.json").read_text() == content
        assert digest == store.digest("run") and digest not in digests
        digests.add(digest)
    (store.run("run") / "stats.json").write_bytes(b"")
    assert store.digest("run") not in digests
    (store.run("run") / "stats.json").unlink()
    assert store.digest("run") == ""
    (store.staging / "half").mkdir()
    with pytest.raises(StorageError, match="HELM did not write all of"):
        store.publish("half")
    store.clear_staging()
    assert {path.name for path in store.folder.iterdir()} == {"run"}


@pytest.mark.parametrize("name", NAMES_OF_NO_FOLDER)
def test_a_suite_is_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a folder's name"):
        SuiteStore(tmp_path, name)


def test_prod_env_keeps_what_is_there(tmp_path: Path, tiny_opt_dir: Path) -> None:
    import yaml

    text, spec = Text.load(str(tiny_opt_dir)), opt_spec("opt-125m")
    path = tmp_path / "model_metadata.yaml"
    path.write_text(
        "models:\n- name: mine/model\n  display_name: Mine\n- name: tierbench/tiny_p\n  display_name: Old\n"
    )
    settings = EngineSettings(str(tiny_opt_dir))
    deployment = make_deployment(settings, Policy(name="p"), spec, "tiny", text, False)
    write_prod_env(tmp_path, [deployment])
    models = {model["name"]: model["display_name"] for model in yaml.safe_load(path.read_text())["models"]}
    assert models == {"mine/model": "Mine", "tierbench/tiny_p": "tiny [p]"}
    path.write_text("- just a list")
    with pytest.raises(UsageError, match="not a HELM configuration file"):
        write_prod_env(tmp_path, [deployment])


def test_windows_leave_room_for_what_is_put_in_front(tiny_opt_dir: Path) -> None:
    text, spec = Text.load(str(tiny_opt_dir)), opt_spec("opt-125m")
    assert spec.max_positions == 2048
    for in_front, length in (((2,), 2048), ((2, 3), 2047), ((), 2048)):
        text.start_ids = text.scoring_prefix = in_front
        deployment = make_deployment(EngineSettings("m"), Policy(), spec, "m", text, False)
        assert deployment.entries["model_deployments.yaml"]["max_request_length"] == length


@pytest.mark.parametrize(
    ("name", "folder"), [("offloaded,kv_quant=4", "offloaded-kv_quant-4"), ("a/b", "a-b"), ("...", "unnamed")]
)
def test_slugs_are_safe_in_run_entries_and_folders(name: str, folder: str) -> None:
    assert slug(name) == folder


def test_long_slugs_are_short_and_differ() -> None:
    text = "weights=0.25/0.5/0.25,kv=0/0.15/0.85,activations=host,device_batch=16,num_device_batches="
    assert len({slug(f"{text}{count}") for count in range(20)}) == 20
    for name in (text, "模" * 100, "é" * 31):
        assert len(slug(name).encode()) <= 60 and slug(slug(name)) == slug(name)


def test_plain_progress_is_sparse() -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.begin("requests", 100)
    for done in range(100):
        progress.update(done + 1)
    progress.end("fine")
    assert stream.getvalue().splitlines() == [stream.getvalue().strip()]
    assert stream.getvalue().startswith("requests: 100 in ") and "fine" in stream.getvalue()


def test_live_progress_shows_time_left_and_leaves_one_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(stream)
    progress.begin("requests", 4)
    progress._printed = float("-inf")
    progress.update(2, "3 passes", eta_seconds=90)
    progress.end()
    assert "\rrequests: 2/4, 3 passes, 1:30 left" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1
