"""Divergence between two models' logits against its formulas, through the file, row by row."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.divergence import ComparedPositions, LogitComparison, LogitFile, kl_divergence
from engine.errors import DamagedFileError, StorageError, UsageError

PLACES = ComparedPositions(firsts=(3, 0, 5), counts=(4, 0, 2))


def logits(seed: int, rows: int = 6, vocabulary: int = 11) -> torch.Tensor:
    """Random logits [rows, vocabulary]; the same for the same arguments."""
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def expected(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """The definition, in plain Python."""
    result = []
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        norm_a, norm_b = math.fsum(map(math.exp, a)), math.fsum(map(math.exp, b))
        p, q = [math.exp(x) / norm_a for x in a], [math.exp(x) / norm_b for x in b]
        result.append(math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    return result


def write(path: Path, values: torch.Tensor) -> None:
    """Rows 0 to 3 are request 0's, rows 4 and 5 request 2's; some are written one by one, some together."""
    file = LogitFile(path, PLACES)
    file.add(2, 6, values[5:6])
    file.add(0, 3, values[0:1])
    file.add(0, 4, values[1:4])
    file.add(2, 5, values[4:5])
    file.finish()


def test_kl_is_the_definition() -> None:
    first, second = logits(0), logits(1)
    assert kl_divergence(first, second).tolist() == pytest.approx(expected(first, second), rel=1e-6)


def test_kl_of_equal_logits_is_zero_and_shifts_do_not_matter() -> None:
    first = logits(0)
    assert kl_divergence(first, first).tolist() == [0] * 6
    assert kl_divergence(first, first + 7).max() < 1e-12


def test_a_token_that_the_first_excludes_adds_nothing() -> None:
    first, second = logits(0), logits(1)
    first[:, 2] = -torch.inf
    both = second.clone()
    both[:, 2] = -torch.inf
    rest = [i for i in range(11) if i != 2]
    assert kl_divergence(first, both).tolist() == pytest.approx(expected(first[:, rest], second[:, rest]))
    assert kl_divergence(both, first + 0).isfinite().all()
    assert kl_divergence(second, first).isinf().all(), "what the second excludes is infinitely far away"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_file_and_comparison(tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = logits(0).to(dtype), logits(1).to(dtype)
    path = tmp_path / "reference.npy"
    write(path, first)
    kept = np.load(path)
    assert kept.dtype == (np.float16 if dtype is torch.float16 else np.float32)
    assert (torch.from_numpy(kept).float() == first.float()).all()
    compared = LogitComparison(path, PLACES)
    compared.add(0, 3, second[0:4])
    assert np.isnan(compared.kl[4:]).all()
    compared.add(2, 5, second[4:6])
    assert compared.kl.tolist() == pytest.approx(expected(first.double(), second.double()), rel=1e-6)
    assert compared.agree.tolist() == (first.argmax(-1) == second.argmax(-1)).tolist()


def test_positions_outside_are_left_alone(tmp_path: Path) -> None:
    values = logits(0)
    write(tmp_path / "a.npy", values)
    compared = LogitComparison(tmp_path / "a.npy", PLACES)
    compared.add(1, 0, logits(3))  # compares nothing of request 1
    compared.add(0, 0, torch.cat([logits(4, rows=3), values[:4], logits(5, rows=2)]))
    compared.add(2, 7, logits(6))
    assert compared.kl[:4].tolist() == [0] * 4
    assert np.isnan(compared.kl[4:]).all()


def test_an_unfinished_file_has_no_name(tmp_path: Path) -> None:
    file = LogitFile(tmp_path / "a.npy", PLACES)
    file.add(0, 3, logits(0, rows=3))
    with pytest.raises(StorageError, match="lacks the logits of 3 positions"):
        file.finish()
    assert not (tmp_path / "a.npy").exists()


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "a.npy", logits(0))
    with pytest.raises(UsageError, match="not 9 rows"):
        LogitComparison(tmp_path / "a.npy", ComparedPositions((0,), (9,)))
    with pytest.raises(UsageError, match="vocabularies of 11 and 12 tokens"):
        LogitComparison(tmp_path / "a.npy", PLACES).add(0, 3, logits(0, vocabulary=12))
    (tmp_path / "b.npy").write_text("no")
    with pytest.raises(UsageError, match=r"b\.npy is not a file of logits"):
        LogitComparison(tmp_path / "b.npy", PLACES)
    (tmp_path / "a.npy.crc").unlink()
    with pytest.raises(DamagedFileError, match=r"a\.npy is not a file of logits"):
        LogitComparison(tmp_path / "a.npy", PLACES)


def test_a_changed_bit_in_the_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write(path, logits(0))
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    compared = LogitComparison(path, PLACES)
    compared.add(0, 3, logits(1)[0:4])
    with pytest.raises(DamagedFileError, match="damaged in rows 4 to 6"):
        compared.add(2, 5, logits(1)[4:6])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        LogitFile(tmp_path / "file" / "a.npy", PLACES).add(0, 3, logits(0))
