"""The lock files, the packaging metadata and the import rules hold what the README promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    """The exact versions of a lock file by canonical package name."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines), "only exact pins belong here"
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [
        ("requirements.lock", PROJECT["dependencies"]),
        ("requirements-dev.lock", PROJECT["optional-dependencies"]["dev"]),
    ],
)
def test_lock_satisfies_what_pyproject_asks(lock: str, wanted: list[str]) -> None:
    pinned = pins(lock)
    for requirement in map(Requirement, wanted):
        if requirement.name == "torch":
            assert "torch" not in pinned, "torch is installed in a step of its own"
            continue
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is not met by {version}"


def test_lock_leaves_out_what_breaks_text_runs() -> None:
    assert not {"torchvision", "torch"} & set(pins("requirements.lock"))


def test_helm_unpacks_with_the_locked_zstandard(tmp_path: Path) -> None:
    """crfm-helm asks for zstandard 0.18, a C source; the wheel in the lock does the same work."""
    general = pytest.importorskip("helm.common.general")
    import zstandard

    archive = tmp_path / "rows.jsonl.zst"
    archive.write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "row"}\n' * 1000))
    general.ensure_file_downloaded(source_url=archive.as_uri(), target_path=str(tmp_path / "rows.jsonl"))
    assert (tmp_path / "rows.jsonl").read_bytes() == b'{"text": "row"}\n' * 1000


def test_engine_names_no_tokenizer() -> None:
    """A rule that import-linter cannot express: the engine may use transformers, but not its tokenizers."""
    for path in (ROOT / "engine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not [name for name in names if "tokeniz" in name.lower()], path


@pytest.mark.network
@pytest.mark.slow
def test_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    listed = subprocess.run(
        ["git", "ls-files", "engine", "harness", "scenarios", "run_helm.py"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout.split("\n")
    (wheel,) = tmp_path.glob("tierbench-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
        entry_points = next(name for name in shipped if name.endswith("entry_points.txt"))
        assert "tierbench = run_helm:main" in archive.read(entry_points).decode()
    assert {name for name in listed if name} <= shipped
