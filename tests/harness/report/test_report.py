"""The report agrees with the files that it is made from; it is well formed, inert and reproducible."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UsageError
from harness.report.analysis.findings import findings
from harness.report.inputs.reading import read_suite
from harness.report.tables import summary_table
from harness.report.write import Report, write_report

FIXTURE = Path(__file__).parent / "fixtures" / "report_suite"
HOSTILE = (
    "</title><script>alert(\"1\")</script><img src=x onerror='a'>|`$\\frac{1}$"
    "\x00\u202e\ud800&#x3c; [a](b) 表"
)


@pytest.fixture
def suite_dir(tmp_path: Path) -> Path:
    """A copy of the stored suite that a test may change."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "results" / "runs" / "demo"))


def write(suite_dir: Path, output: Path) -> Report:
    """The report of one suite."""
    return write_report(suite_dir.parent.parent, [suite_dir.name], output)


def change(path: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def manifest(suite_dir: Path, policy: str = "offloaded") -> Path:
    return suite_dir / "policies" / policy / "manifest.json"


class Page(html.parser.HTMLParser):
    """Collects a page's elements for checks of the HTML; fails where they do not nest."""

    VOID = frozenset({"meta", "wbr", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_inert(report: Report) -> None:
    """Assert well-formed HTML, no script except ours, nothing loaded, and links within the page only."""
    text = report.html.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"img", "iframe", "object", "link", "base", "form", "input"}
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(re.findall("<script", text, re.IGNORECASE)) == 1
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    targets = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert targets and all(value.startswith("#") for value in targets)
    assert len(page.ids) == len(set(page.ids))
    assert {value[1:] for value in targets} <= set(page.ids)
    for picture in report.pictures:
        tree = ElementTree.parse(picture)
        assert not [e for e in tree.iter() if e.tag.endswith(("script", "image", "foreignObject"))]


def test_report_holds_every_result_of_the_table(suite_dir: Path, tmp_path: Path) -> None:
    report = write(suite_dir, tmp_path / "report")
    check_inert(report)
    markdown, page = report.markdown.read_text(), Page(report.html.read_text())
    for row in json.loads((FIXTURE / "table.json").read_text())["rows"]:
        value, span = f"{row['accuracy']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"
        line = f"| `{row['run_entry']}` | `{row['policy']}` | `exact_match` | {value} | {span} |"
        assert line in markdown
        assert span in page.text and row["run_entry"] in page.text
    names = ["accuracy", "bits-accuracy", "frontier", "throughput", "streams", "timeline", "memory"]
    assert [path.name for path in report.pictures] == [f"{name}.svg" for name in names]
    for path in report.pictures:
        assert f"({path.name})" in markdown
        assert "measured" in path.read_text(), "every picture says how its figures were obtained"


def test_same_results_give_the_same_bytes(suite_dir: Path, tmp_path: Path) -> None:
    one, two = (write(suite_dir, tmp_path / name) for name in ("one", "two"))
    for path in (one.markdown, one.html, one.csv, one.parquet, *one.pictures):
        assert path.read_bytes() == (two.markdown.parent / path.name).read_bytes()


def test_figures_are_those_of_the_record(tmp_path: Path) -> None:
    suite = read_suite(FIXTURE)
    offloaded = suite.policies[1]
    totals = json.loads(manifest(FIXTURE).read_text())["engine"]["totals"]
    assert offloaded.generated_per_second == totals["generated_tokens"] / totals["seconds"]
    tokens = totals["generated_tokens"] + totals["prompt_tokens"]
    assert offloaded.total_per_second == tokens / totals["seconds"]
    rows = [r for r in suite.results if r.policy == "offloaded"]
    mean = findings(suite).means["offloaded"]
    assert mean.low is not None
    assert mean.value == pytest.approx(sum(r.value or 0 for r in rows) / len(rows))
    squares = sum(((r.value or 0) - (r.low or 0)) ** 2 for r in rows)
    assert mean.low == pytest.approx(mean.value - math.sqrt(squares) / len(rows))
    assert summary_table(findings(suite)).rows[0][3] == "–", "the first policy is compared with nothing"


def test_parts_of_a_continued_suite_are_summed(suite_dir: Path) -> None:
    before = read_suite(suite_dir).policies[1]
    change(manifest(suite_dir), lambda m: m.update(earlier_sessions=[m["engine"]]))
    after = read_suite(suite_dir).policies[1]
    assert (after.sessions, after.requests, after.passes) == (2, 2 * before.requests, 2 * before.passes)
    assert after.total_per_second == pytest.approx(before.total_per_second)
    assert [stream.share for stream in after.streams.values()] == pytest.approx(
        [stream.share for stream in before.streams.values()], abs=1e-3
    )
    assert after.tiers == before.tiers


def test_hostile_texts_are_inert(suite_dir: Path, tmp_path: Path) -> None:
    def taint(content: Any) -> Any:
        """Replace every text of a record, except the words that have a meaning for the program."""
        if isinstance(content, dict):
            kept = {"kind", "policy", "ph", "cat", "run_entry"}
            return {k: v if k in kept and isinstance(v, str) else taint(v) for k, v in content.items()}
        if isinstance(content, list):
            return [taint(item) for item in content]
        return HOSTILE + content if isinstance(content, str) else content

    for path in [suite_dir / "table.json", *suite_dir.glob("policies/*/*.json")]:
        text = json.dumps(taint(json.loads(path.read_text())))
        hostile = json.dumps(HOSTILE)[1:-1]
        for name in ("resident", "information_extraction", "kv_in"):
            text = text.replace(f'"{name}"', f'"{name}{hostile}"')
        path.write_text(text)
    report = write(suite_dir, tmp_path / "report")
    check_inert(report)
    markdown = report.markdown.read_text(encoding="utf-8")
    outside_code = re.sub(r"(`+) ?.*?[^`]\1(?!`)", "", markdown)
    assert not re.search(r"(?<!\\)<", outside_code)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", markdown + report.html.read_text(encoding="utf-8"))


def test_report_stays_in_its_folder(suite_dir: Path, tmp_path: Path) -> None:
    change(suite_dir / "table.json", lambda table: table.update(suite="../../elsewhere"))
    before = set(tmp_path.rglob("*"))
    write(suite_dir, tmp_path / "out" / "report")
    made = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert {path.parent for path in made} == {tmp_path / "out" / "report"}
    assert len(made) == 11


def test_what_was_not_measured_is_named_everywhere(suite_dir: Path, tmp_path: Path) -> None:
    change(suite_dir / "table.json", lambda table: [row.update(kind="simulated") for row in table["rows"]])
    for path in suite_dir.glob("policies/*/manifest.json"):
        change(path, lambda m: m["engine"].update(kind="simulated"))
        change(path, lambda m: m["engine"]["model"].update(weights="random"))
    report = write(suite_dir, tmp_path / "report")
    page = Page(report.html.read_text())
    assert (
        "accuracies here say nothing" in page.text
        and "Not everything here is known to be measured" in page.text
    )
    for path in report.pictures:
        assert "simulated" in path.read_text() and "measured" not in path.read_text()


def test_lost_account_of_a_killed_process(suite_dir: Path, tmp_path: Path) -> None:
    """All answers are in the journal, but the process died before it wrote the manifest."""

    def lose(record: Any) -> None:
        record["engine"]["placement"] = {}
        record["engine"]["totals"] = dict.fromkeys(record["engine"]["totals"], 0)
        record["engine"]["streams"] = {k: dict.fromkeys(v, 0) for k, v in record["engine"]["streams"].items()}

    change(manifest(suite_dir), lose)
    report = write(suite_dir, tmp_path / "report")
    check_inert(report)
    text = Page(report.html.read_text()).text
    assert "account of policy offloaded was lost" in text and "not measured" in text


def test_missing_trace_and_other_metrics(suite_dir: Path, tmp_path: Path) -> None:
    for path in suite_dir.glob("policies/*/trace.json"):
        path.unlink()

    def edit(table: Any) -> None:
        for row in table["rows"]:
            row.update(metric="bits_per_byte", accuracy=1.25, low=math.nan, high=math.nan, generated_tokens=0)

    change(suite_dir / "table.json", edit)
    report = write(suite_dir, tmp_path / "report")
    check_inert(report)
    assert [path.name for path in report.pictures] == ["throughput.svg", "streams.svg", "memory.svg"]
    markdown = report.markdown.read_text()
    assert "1.250 (bits\\_per\\_byte)" in markdown
    assert "No trace with a whole pass was stored for: resident, offloaded, offloaded-4bit." in markdown


def test_excerpt_is_the_pass_of_median_length(suite_dir: Path) -> None:
    def event(name: str, begin: float, length: float) -> dict[str, object]:
        return {"ph": "X", "name": name, "cat": "compute", "ts": begin, "dur": length, "args": {}}

    starts = [0.0, 10.0, 40.0, 60.0]  # passes of 10, 30, 20 and 5 microseconds
    events = [event("compute 0.0", start, 5.0) for start in starts]
    trace = manifest(suite_dir).with_name("trace.json")
    trace.write_text(json.dumps({"traceEvents": [*events, event("compute 10.0", 25.0, 5.0)]}))
    excerpt = read_suite(suite_dir).policies[1].excerpt
    assert excerpt is not None and excerpt.whole and excerpt.passes == 4
    assert excerpt.seconds == pytest.approx(20e-6), "of an even number the longer middle one"
    assert [span.begin for span in excerpt.spans] == [0.0]

    many = [event(f"compute {i}.0", 2.0 * i, 1.0) for i in range(5000)]
    trace.write_text(json.dumps({"traceEvents": many}))
    excerpt = read_suite(suite_dir).policies[1].excerpt
    assert excerpt is not None and not excerpt.whole and len(excerpt.spans) < 400


Harm = Callable[[Path], object]


def in_row(**fields: object) -> Harm:
    return lambda d: change(d / "table.json", lambda table: table["rows"][0].update(fields))


DAMAGES: dict[str, tuple[str, Harm]] = {
    "no table": ("table.json", lambda d: (d / "table.json").unlink()),
    "half a table": ("table.json", lambda d: (d / "table.json").write_text('{"schema": 1, "rows": [')),
    "not text": ("table.json", lambda d: (d / "table.json").write_bytes(b"\xff\xfe\x00")),
    "a list": ("table.json", lambda d: (d / "table.json").write_text("[]")),
    "other schema": ("table.json", lambda d: change(d / "table.json", lambda t: t.update(schema=9))),
    "no rows": ("table.json", lambda d: change(d / "table.json", lambda t: t.update(rows=[]))),
    "no policy": ("rows[0].policy", lambda d: change(d / "table.json", lambda t: t["rows"][0].pop("policy"))),
    "negative count": ("rows[0].requests", in_row(requests=-1)),
    "number as text": ("rows[0].accuracy", in_row(accuracy="1")),
    "infinite seconds": ("rows[0].seconds", in_row(seconds=math.inf)),
    "unknown kind": ("rows[0].kind", in_row(kind="guessed")),
    "no manifest": ("'offloaded'", lambda d: manifest(d).unlink()),
    "empty manifest": ("manifest.json", lambda d: manifest(d).write_text("")),
    "totals as text": (
        "engine.totals",
        lambda d: change(manifest(d), lambda m: m["engine"].update(totals="9")),
    ),
    "tier as list": (
        "memory.host",
        lambda d: change(manifest(d), lambda m: m["engine"]["memory"].update(host=[])),
    ),
    "damaged trace": ("trace.json", lambda d: manifest(d).with_name("trace.json").write_text("[3]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_suite_is_refused_in_one_line(suite_dir: Path, tmp_path: Path, damage: str) -> None:
    named, harm = DAMAGES[damage]
    harm(suite_dir)
    with pytest.raises(UsageError, match=re.escape(named)) as refusal:
        write(suite_dir, tmp_path / "report")
    assert "\n" not in str(refusal.value) and "run the suite again" in str(refusal.value)
    assert not (tmp_path / "report").exists()


def test_report_is_light_to_import() -> None:
    code = "import sys, harness.report; print(*{'matplotlib', 'torch', 'helm', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
