"""Reads a suite's files in tests, with or without their times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.files import HELM_FILES
from harness.suite.runner import SuiteResult

TIMES = {
    "request_time", "batch_size", "batch_request_time",  # of a HELM result
    "seconds", "generated_per_second", "total_per_second",  # of a row of table.json
    "crc32",  # depends on them
    "load_seconds", "process_peak",  # of a suite's total
}  # fmt: skip

TIME_STATS = {"inference_runtime", "inference_denoised_runtime", "batch_size"}


def read_states(result: SuiteResult, entry: str, policy: str) -> list[dict[str, Any]]:
    """HELM's request states of one run."""
    (row,) = [r for r in result.rows if r.run_entry.split(":")[0] == entry and r.policy == policy]
    state = json.loads((result.folder / row.run_name / "scenario_state.json").read_text())
    return list(state["request_states"])


def comparable(folder: Path, times: bool = False) -> dict[str, Any]:
    """The content of all result files of a suite by name; times are left out unless asked for."""
    paths = [path for name in HELM_FILES for path in folder.glob(f"*/{name}")] + [folder / "table.json"]
    contents = {str(path.relative_to(folder)): json.loads(path.read_text()) for path in paths}
    return contents if times else {name: _without_times(content) for name, content in contents.items()}


def assert_close(got: Any, expected: Any, where: str = "") -> None:
    """Assert equality, of floats within 1e-5: sums have another order if blocks are composed differently."""
    if isinstance(expected, float) and isinstance(got, float):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-5), where
    elif isinstance(expected, dict) and isinstance(got, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(got[key], value, f"{where}/{key}")
    elif isinstance(expected, list) and isinstance(got, list):
        assert len(got) == len(expected), where
        for index, value in enumerate(expected):
            assert_close(got[index], value, f"{where}/{index}")
    else:
        assert got == expected, where


def _without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_times(item) for item in value if not _is_time_stat(item)]
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return value


def _is_time_stat(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("name"), dict)
        and item["name"].get("name") in TIME_STATS
    )
