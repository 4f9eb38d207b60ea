"""Fixtures of the engine's tests: tiny models, made once per session, and quiet libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from tests.support.engine_models import Family, make_family

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """The tiny model of a family by name, made at its first use."""
    made: dict[str, Family] = {}

    def get(name: str) -> Family:
        if name not in made:
            made[name] = make_family(name, tmp_path_factory.mktemp("family") / name)
        return made[name]

    return get


@pytest.fixture(scope="session")
def llama(family: Callable[[str], Family]) -> Family:
    """The family for tests in which the family does not matter."""
    return family("llama")


@pytest.fixture
def offload(tmp_path: Path) -> Path:
    """A folder for the disk tier."""
    return tmp_path / "offload"
