"""What the engine imports: nothing of HELM, the harness or tokenizers; and its nouns not even torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "safetensors", "accelerate", "numpy"}
FOREIGN = {"helm", "harness", "scenarios", "datasets", "pandas", "matplotlib"}


def modules(*names: str) -> set[str]:
    """Top-level packages that a new interpreter has imported after importing these modules."""
    code = f"import sys, json, {', '.join(names)}; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def dotted(folder: str) -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def test_nouns_and_decisions_need_no_torch() -> None:
    loaded = modules(*dotted("engine/spec"), *dotted("engine/plan"), "engine.errors", "engine.units")
    assert not loaded & (HEAVY | FOREIGN)


def test_the_package_s_names_are_imported_when_used() -> None:
    assert not modules("engine") & (HEAVY | FOREIGN)
    code = (
        "import sys, engine; from engine import Budgets, EngineSettings, Output, Policy, Request;"
        "assert 'torch' not in sys.modules; assert all(hasattr(engine, name) for name in engine.__all__);"
        "from engine.engine import Engine; assert engine.Engine is Engine; from engine import *;"
        "assert not hasattr(engine, 'Engines')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_engine_needs_nothing_of_the_harness() -> None:
    loaded = modules(*dotted("engine"))
    assert "torch" in loaded and not loaded & (FOREIGN | {"pytest", "hypothesis"})


def test_benchmarks_start_without_helm() -> None:
    """Some use the harness's baselines, which are as light to import as the engine."""
    loaded = modules(*dotted("benchmarks"))
    assert not loaded & ((FOREIGN - {"harness"}) | {"pytest", "hypothesis"})


@pytest.mark.parametrize(
    "path", sorted((ROOT / "engine").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_module_knows_text(path: Path) -> None:
    """No tokenizer and no unexpected package, not even inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            assert name.split(".")[0] not in FOREIGN | {"tokenizers", "tests"}
            assert "Tokenizer" not in name and "tokenization" not in name
