"""Fixtures of the batch command's tests: a tiny model with a chat template, by us and by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness.openai_batch.batch_files import TEMPLATE
from tests.support.tiny_models import copy_with_template


@pytest.fixture(scope="module")
def model(tiny_opt_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    return copy_with_template(tiny_opt_dir, tmp_path_factory.mktemp("batch") / "tiny-chat", TEMPLATE)


@pytest.fixture(scope="module")
def reference(model: Path) -> Any:
    """The same model, by transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model).eval()
