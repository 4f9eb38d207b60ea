"""Settings of the whole suite: tests marked ``gpu`` are skipped where there is no CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as run_helm.py does, before torch is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests without a CUDA device; torch is imported only if there are such tests."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what tests pack out of the user's packed store, child processes' too."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIERBENCH_STORE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_opt_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random OPT of 2 layers, 256 positions, with a byte-level tokenizer."""
    from tests.support.tiny_models import save_tiny_opt

    return save_tiny_opt(tmp_path_factory.mktemp("models") / "tiny-opt")
