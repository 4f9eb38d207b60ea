"""Settings of the whole suite, which one process runs or several workers do.

Tests marked ``gpu`` are skipped where there is no CUDA device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.agreement import COMPARISON
from tests.support.workers import is_worker, shared_folder, usable_cores

# Before torch is imported, and for child processes: waiting threads sleep, as in run_helm.py, and a worker
# computes with one, since the others have the other cores. Tests of several threads say how many they want.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto`` means: a worker for each core."""
    return usable_cores()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests without a CUDA device; torch is imported only if there are such tests."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker sends its comparison with `transformers` to the main process."""
    if is_worker(session.config):
        session.config.workeroutput["agreement"] = COMPARISON.figures()  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add a worker's figures, unless it crashed."""
    COMPARISON.add(getattr(node, "workeroutput", {}).get("agreement", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report how close the engine was to `transformers`."""
    if COMPARISON.answers:
        terminalreporter.write_line(
            f"engine against transformers: {COMPARISON.answers} answers of "
            f"{len(COMPARISON.families)} families, worst |d log p| {COMPARISON.worst:.2g}"
        )


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compiled_by_one_worker(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without it, all workers would compile the kernels when the user's cache is empty."""
    if is_worker(pytestconfig):
        from engine.kernels.cpu import build

        with FileLock(shared_folder(pytestconfig, tmp_path_factory) / "kernels.lock"):
            build.library()


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Use a packed store for tests instead of the user's, in child processes, too."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIERBENCH_STORE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_opt_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random OPT of 2 layers, 256 positions, with a byte-level tokenizer."""
    from tests.support.tiny_models import save_tiny_opt

    return save_tiny_opt(tmp_path_factory.mktemp("models") / "tiny-opt")
