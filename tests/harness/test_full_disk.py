"""Every file that is written, on a full disk, in a read-only folder and in one that vanishes: one line."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from engine.divergence import ComparedPositions, LogitFile
from engine.errors import TierbenchError
from engine.files.whole import write_whole
from engine.memory.storage import Tiers
from engine.memory.weights.smoothing import write_statistics
from engine.spec.hardware import Tier
from engine.spec.request import Output
from engine.trace import Trace
from harness.files import JsonLines, SuiteStore, write_json
from harness.helm.registry import Deployment, write_prod_env
from harness.openai_batch.results import AskedLine, ResultFile
from harness.report.plots.style import picture
from harness.suite.journal import Answer, Journal
from harness.throughput.text import append
from tests.support.profiles import make_profile
from tests.support.store_entries import make

ROOT = Path(__file__).resolve().parents[2]


def text(folder: Path) -> None:
    write_whole(folder / "table.md", "a table")


def json_file(folder: Path) -> None:
    write_json(folder / "manifest.json", {"schema": 1})


def journal(folder: Path) -> None:
    with Journal(folder / "journal.jsonl") as found:
        found.keep("key", Answer(Output((1,), (-0.5,), None, "stop", 1.0, 0.1), 3))


def log(folder: Path) -> None:
    JsonLines(folder / "log.jsonl").add({"rate": 1.0})


def batch(folder: Path) -> None:
    with closing(AskedLine()) as asked, closing(ResultFile(folder / "results.jsonl", asked)) as results:
        results.add({"id": "batch_req_1", "custom_id": "a", "response": {"status_code": 200}, "error": None})


def trace(folder: Path) -> None:
    Trace().write_chrome(folder / "trace.json")


def suite(folder: Path) -> None:
    store = SuiteStore(folder, "suite")
    with store.locked():
        write_json(store.folder / "table.json", {"rows": []})


def helm_log(folder: Path) -> None:
    pytest.importorskip("helm.benchmark")
    from harness.helm.bridge import quiet

    with quiet(folder / "helm.log"):
        print("what HELM has to say")


def local_path(folder: Path) -> None:
    pytest.importorskip("helm.benchmark")
    from harness.helm.bridge import SuiteRunner

    SuiteRunner(SuiteStore(Path(tempfile.gettempdir()) / "tierbench-tests", "suite"), folder / "prod_env")


def prod_env(folder: Path) -> None:
    entries = dict.fromkeys(("model_metadata.yaml", "model_deployments.yaml", "tokenizer_configs.yaml"))
    write_prod_env(folder, [Deployment("d", {name: {"name": "d"} for name in entries})])


def offload(folder: Path) -> None:
    tiers = Tiers(torch.device("cpu"), True, dict.fromkeys(Tier, 1 << 20), folder / "offload")
    with closing(tiers):
        tiers.file(8192, "weights").write(0, torch.zeros(8192, dtype=torch.uint8))


def store(folder: Path) -> None:
    make(folder / "store").close()


def profile(folder: Path) -> None:
    make_profile().save(folder / "profile.json")


def statistics(folder: Path) -> None:
    write_statistics(folder / "statistics.safetensors", {"w": torch.ones(4)}, "digest", 3)


def logits(folder: Path) -> None:
    file = LogitFile(folder / "reference.npy", ComparedPositions((0,), (2,)))
    file.add(0, 0, torch.zeros(2, 5))
    file.finish()


def png(folder: Path) -> None:
    with picture(1.0, "figure", png=folder / "figure.png"):
        pass


def throughput(folder: Path) -> None:
    append(folder / "throughput.jsonl", {"rate": 1.0})


WRITERS = [text, json_file, journal, log, batch, trace, suite, helm_log, prod_env, offload, store, profile,
           statistics, logits, png, throughput]  # fmt: skip


@contextmanager
def full_disk() -> Iterator[None]:
    """Files cannot grow: the kernel refuses each write as on a full disk, as root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_line(error: TierbenchError, path: Path, *reasons: str) -> None:
    """One line with the path, a reason and a cure."""
    line = str(error)
    assert "\n" not in line and str(path) in line and error.exit_code in (1, 2), line
    assert any(reason in line for reason in reasons), line


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_space_cures_it(writer: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(TierbenchError) as caught, full_disk():
        writer(folder)
    check_line(caught.value, folder, "File too large")
    assert "free" in str(caught.value)
    writer(folder)
    left = {path.name for path in folder.rglob("*") if path.suffix in (".tmp", ".partial", ".bin", ".part")}
    assert left <= {"weights.bin"}


@pytest.mark.parametrize("writer", [*WRITERS, local_path])
@pytest.mark.parametrize("where", ["read-only", "a file is in its place"])
def test_a_folder_that_cannot_be_written_is_one_line(
    writer: Callable[[Path], None], where: str, tmp_path: Path
) -> None:
    folder = Path("/sys/tierbench") if where == "read-only" else tmp_path / "out"
    if where != "read-only":
        folder.write_text("")
    with pytest.raises(TierbenchError) as caught:
        writer(folder)
    check_line(caught.value, folder, "ermi", "Read-only", "No such file", "Not a directory", "File exists")


@pytest.mark.parametrize("writer", [text, journal, log, batch, trace, suite, prod_env, offload, store])
def test_a_folder_that_vanished_is_made_again(writer: Callable[[Path], None], tmp_path: Path) -> None:
    writer(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    writer(tmp_path / "out")
    assert any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "sizes", [(5_000, None), pytest.param((500, 5_000, 30_000, None), marks=pytest.mark.slow)]
)
def test_a_run_on_a_full_disk_goes_on_when_there_is_space(
    tmp_path: Path, sizes: tuple[int | None, ...]
) -> None:
    pytest.importorskip("helm.benchmark")
    command = [sys.executable, str(ROOT / "run_helm.py"), "run", "-q", "--suite", "full", "-m", "4"]
    command += ["-r", "form_processing", "--policy", "resident", "-o", str(tmp_path / "out")]
    command += ["--local-path", str(tmp_path / "prod_env")]
    for most in sizes:

        def limit(most: int | None = most) -> None:
            if most is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, cwd=ROOT, preexec_fn=limit, env=os.environ
        )
        if most is None:
            assert done.returncode == 0, done.stderr
            assert (tmp_path / "out" / "reports" / "full" / "report.html").is_file()
        else:
            assert done.returncode == 1, (most, done.stderr)
            (line,) = [line for line in done.stderr.splitlines() if not line.startswith("/")]
            assert line.startswith("error: cannot write ") and str(tmp_path) in line and "free" in line
