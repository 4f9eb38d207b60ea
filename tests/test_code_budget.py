"""The check that keeps files, folders, functions and imports within their limits finds what passes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import code_budget
from tests.code_budget import FILE_LINES, FOLDER_FILES, FUNCTION_LINES, PARAMETERS, violations

ROOT = Path(__file__).resolve().parent.parent


def write(root: Path, **files: str) -> Path:
    """A made-up checkout; keys are dotted module names."""
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_checkout_is_within_its_limits() -> None:
    assert violations(ROOT) == []


def test_at_the_limits_nothing_is_said(tmp_path: Path) -> None:
    parameters = ", ".join(f"p{i}" for i in range(PARAMETERS))
    body = "    pass\n" * (FUNCTION_LINES - 1)
    files = {f"engine__m{i}": "" for i in range(FOLDER_FILES)}
    files["engine__m0"] = f"class C:\n  def f(self, {parameters}): pass\ndef g():\n{body}"
    files["engine__m1"] = "\n" * FILE_LINES
    files["engine__m2"] = "def f(x: Tensor):\n  'Doubles x, [T, E].'\ndef _g(x: Tensor): pass"
    assert violations(write(tmp_path, **files)) == []


@pytest.fixture(autouse=True)
def no_exceptions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up checkout has none of ours."""
    if "tmp_path" in request.fixturenames:
        monkeypatch.setattr(code_budget, "WIDE_FUNCTIONS", {})
        monkeypatch.setattr(code_budget, "LONG_FUNCTIONS", {})


@pytest.mark.parametrize(
    "files, said",
    [
        ({"harness__a": "\n" * (FILE_LINES + 1)}, "harness/a.py: 401 lines"),
        ({f"engine__plan__m{i}": "" for i in range(FOLDER_FILES + 1)}, "engine/plan: 13 Python files"),
        ({"engine__a": "def f():\n" + "    pass\n" * FUNCTION_LINES}, "f: 61 lines"),
        ({"engine__a": "def f(a, b, c, d, *, e, f, g, h): pass"}, "f: 8 parameters"),
        ({"engine__a": "def f(x: Tensor):\n  'Doubles it.'"}, "f: takes a tensor and states no shape"),
        ({"engine__a": "import engine.b", "engine__b": "from engine import a"}, "engine.a, engine.b"),
        (
            {
                "engine__a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import engine.b",
                "engine__b": "def f():\n    from engine.c import y",
                "engine__c": "from engine.a import z",
            },
            "engine.a, engine.b, engine.c",
        ),
    ],
    ids=["file", "folder", "long", "wide", "shape", "circle", "hidden circle"],
)
def test_what_passes_a_limit_is_named(tmp_path: Path, files: dict[str, str], said: str) -> None:
    (found,) = violations(write(tmp_path, **files))
    assert said in found


def test_an_exception_is_named_by_its_function_and_goes_when_nothing_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_budget, "WIDE_FUNCTIONS", {"engine/a.py:f": "a kernel's signature"})
    write(tmp_path, engine__a="def f(a, b, c, d, e, f, g, h): pass")
    assert violations(tmp_path) == []
    write(tmp_path, engine__a="def f(a): pass")
    (found,) = violations(tmp_path)
    assert "take it out" in found
