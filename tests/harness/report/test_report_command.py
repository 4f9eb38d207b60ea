"""`run_helm.py report`: changes on one screen, and a server for this machine and its folder only."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UsageError
from harness import cli
from harness.report.changes import changes
from harness.report.serve import make_server

FIXTURE = Path(__file__).parent / "fixtures" / "report_results"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Stored results with a second suite in which one policy is faster and one answer differs."""
    results = Path(shutil.copytree(FIXTURE, tmp_path / "results"))
    after = Path(shutil.copytree(results / "runs" / "small", results / "runs" / "later"))
    path = after / "policies" / "resident" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["engine"]["totals"]["seconds"] /= 2
    manifest["engine"]["software"]["torch"] = "9.9"
    manifest["engine"]["memory"]["host"]["peak"] *= 3
    path.write_text(json.dumps(manifest))
    table = json.loads((after / "table.json").read_text())
    row = next(
        r for r in table["rows"] if r["policy"] == "packed" and r["run_entry"] == "information_extraction"
    )
    path = after / row["run_name"] / "per_instance_stats.json"
    stored = json.loads(path.read_text())
    for entry in stored:
        for stat in entry["stats"]:
            stat["mean"] = 0.0 if stat["name"]["name"] == "exact_match" else stat["mean"]
    path.write_text(json.dumps(stored))
    row["accuracy"] = 0.0
    (after / "table.json").write_text(json.dumps(table))
    return results


def test_what_changed_fits_a_screen(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--compare", "small", "later", "-o", str(results)]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 24 and max(map(len, shown.splitlines())) <= 130
    resident = next(line for line in shown.splitlines() if line.startswith("| resident"))
    assert "2.00×" in resident and " 0.000 " in resident
    changed = next(line for line in shown.splitlines() if line.startswith("| information_extraction"))
    assert "packed" in changed and "→ 0.000" in changed and "significant" in changed
    assert "torch: 2.13.0+cpu → 9.9" in shown and "resident, peak memory on host" in shown
    markdown = (results / "reports" / "small..later" / "changes.md").read_text()
    assert "# small → later" in markdown and "2.00×" in markdown


def test_nothing_changed(results: Path) -> None:
    found = changes(results / "runs" / "small", results / "runs" / "small")
    assert len(found.entries) == 1 and "Same model, machine, software and policies." in found.notes
    assert found.title == "before → after"


def test_suites_without_a_common_policy_are_refused(results: Path) -> None:
    for path in (results / "runs" / "later").glob("policies/*/manifest.json"):
        path.write_text(path.read_text().replace('"policy": "', '"policy": "other-'))
    table = results / "runs" / "later" / "table.json"
    table.write_text(table.read_text().replace('"policy": "', '"policy": "other-'))
    with pytest.raises(UsageError, match="no policy in common"):
        changes(results / "runs" / "small", results / "runs" / "later")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ([], "nothing to report"),
        (["--suite", "../small"], "not a folder's name"),
        (["--suite", "none"], "holds no finished suite: first run_helm.py run --suite none"),
        (["--compare", "small", "later", "--suite", "small"], "--compare stands alone"),
        (["--compare", "small", "none"], "table.json is missing"),
        (["--comparison", "none"], "first run_helm.py compare"),
    ],
)
def test_wrong_flags_are_one_line(
    results: Path, flags: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", *flags, "-o", str(results)]) not in (0, 1)
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1


@pytest.fixture
def server(results: Path) -> Iterator[Any]:
    """A served report."""
    folder = results / "reports" / "small"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<p>the page</p>")
    (folder / "accuracy.svg").write_text("<svg/>")
    (folder / ".hidden").write_text("hidden")
    (folder / "below").mkdir()
    (folder / "below" / "file.txt").write_text("below")
    (folder / "link.txt").symlink_to(results / "runs" / "small" / "table.json")
    (folder.parent / "beside.txt").write_text("beside")
    with make_server(folder, 0) as opened:
        thread = threading.Thread(target=opened.serve_forever, daemon=True)
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


def get(server: Any, path: str, host: str = "127.0.0.1", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_server_is_on_loopback_and_serves_its_files_alone(server: Any) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, "/") == get(server, "/report.html?x=1") == (200, "<p>the page</p>")
    assert get(server, "/accuracy.svg", host=f"localhost:{server.server_port}") == (200, "<svg/>")
    assert get(server, "/report.html", method="HEAD") == (200, "")
    for path in (
        "/../beside.txt", "/%2e%2e/beside.txt", "/..%2fbeside.txt", "//etc/passwd", "/below/",
        "/below/file.txt",
        "/.hidden", "/link.txt", "/report.html/", "/none.html", "/%00",
    ):  # fmt: skip
        status, text = get(server, path)
        assert status == 404 and "beside" not in text and "rows" not in text, path
    assert get(server, "/", host="evil.example")[0] == 403, "a foreign name that points here"
    assert get(server, "/", method="POST")[0] == 501


def test_server_wants_a_report_and_a_free_port(tmp_path: Path, server: Any) -> None:
    with pytest.raises(UsageError, match=r"holds no report\.html"):
        make_server(tmp_path, 0)
    (tmp_path / "report.html").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="give another --port"):
            make_server(tmp_path, taken.getsockname()[1])
    with pytest.raises(UsageError, match="give another --port"):
        make_server(tmp_path, 99_999)
