"""The choice of the float32 product: by measured figures, kept on disk, constant within a process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from engine.errors import UsageError
from engine.kernels import choice
from engine.kernels.cpu import native
from tests.engine.kernels.cpu.native_inputs import noise


def figures(best: str, margin: float = 2.0) -> choice.Rates:
    """Made-up figures in which one candidate is the fastest by a factor."""
    rates = {name: margin if name == best else 1.0 for name in choice.candidates()}
    return {size: {rows: dict(rates) for rows in choice.ROWS} for size in choice.SIZES}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a new process, on a machine without stored figures."""
    monkeypatch.setattr(choice, "_table", [])
    monkeypatch.setattr(choice, "_path", lambda: tmp_path / "products.json")
    monkeypatch.delenv(choice.SWITCH, raising=False)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 100, 5000])
def test_the_fastest_is_taken_and_in_doubt_the_first(rows: int) -> None:
    first, *_, last = choice.candidates()
    for values in (1, 10**8):
        assert choice.choose(figures(last), rows, values) == last
        assert choice.choose(figures(last, 1.04), rows, values) == first
    mixed = figures(first)
    mixed["large"] = figures(last)["large"]
    mixed["small"][2] = figures(last)["small"][2]
    assert choice.choose(mixed, rows, 10**8) == last
    assert choice.choose(mixed, rows, 100) == (last if rows in (2, 3) else first)


def test_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(choice, "measure", lambda: calls.append(1) or figures("torch"))
    assert choice.table() is choice.table() and calls == [1]
    monkeypatch.setattr(choice, "_table", [])  # a later process
    assert choice.table() == figures("torch") and calls == [1]
    for broken in ("", "{}", "[1", json.dumps({"small": {}, "large": {}}), "null"):
        (tmp_path / "products.json").write_text(broken)
        monkeypatch.setattr(choice, "_table", [])
        calls.clear()
        assert choice.table() == figures("torch") and calls == [1]
        assert choice.read(tmp_path / "products.json", choice.candidates()) == figures("torch")
    assert [path.name for path in tmp_path.iterdir()] == ["products.json"]


def test_of_two_processes_that_measure_at_once_both_take_the_first_ones_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def slowly() -> choice.Rates:
        choice._keep(tmp_path / "products.json", figures("torch"))
        return figures(choice.candidates()[0])

    monkeypatch.setattr(choice, "measure", slowly)
    assert choice.table() == figures("torch")


def test_without_a_folder_a_process_measures_for_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(choice, "measure", lambda: figures("torch"))
    for path in (None, tmp_path / "missing" / "products.json"):
        monkeypatch.setattr(choice, "_table", [])
        monkeypatch.setattr(choice, "_path", lambda path=path: path)
        assert choice.table() == figures("torch")


def test_figures_of_a_real_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "SIZES", {"small": (16, 32), "large": (32, 64)})
    monkeypatch.setattr(choice, "_FEWEST_ROWS", 8)
    threads = torch.get_num_threads()
    found = choice.measure()
    assert torch.get_num_threads() == threads
    rates = [rate for by_rows in found.values() for by_name in by_rows.values() for rate in by_name.items()]
    assert {name for name, _ in rates} == set(choice.candidates()) and all(rate > 0 for _, rate in rates)


def test_all_candidates_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = noise(70, 45), noise(70, seed=2)
    for name in choice.candidates():
        monkeypatch.setenv(choice.SWITCH, name)
        for x in (noise(2, 3, 45), noise(45), noise(0, 45), noise(33, 90)[:, ::2]):
            for offset in (bias, None):
                expected = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
                got = choice.linear(x, weight, offset)
                torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_product_that_is_not_available_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.SWITCH, "blas")
    with pytest.raises(
        UsageError, match=re.escape(f"blas is not available: use {', '.join(choice.candidates())}")
    ):
        choice.linear(noise(1, 4), noise(4, 4))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 16, 17, 70])
def test_the_product_in_c(tokens: int) -> None:
    weight = noise(67, 1410)[:, :1405]
    x = noise(tokens, 1405, seed=1)
    for threads in (1, 3):
        got = native.linear(x, weight, noise(67), threads=threads)
        expected = F.linear(x.double(), weight.double(), noise(67).double())
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="activations"):
        native.linear(noise(1, 3), noise(4, 4))
    with pytest.raises(ValueError, match="consecutive"):
        native.linear(noise(1, 4), noise(4, 4).t())
