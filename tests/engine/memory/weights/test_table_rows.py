"""Single rows of a table on disk: the right ones, read beside the page cache, with nothing left in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import StorageError
from engine.memory.disk.io_pool import IOPool
from engine.memory.storage import DiskFile
from engine.memory.weights import table_rows
from engine.memory.weights.table_rows import GAP_BYTES, read_rows
from tests.support.page_cache import resident_pages

ROWS, SIZE, OFFSET = 200, 1000, 777
"""A table that is aligned to nothing; as long as a dozen gaps, so that rows are read in runs and alone."""


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """[ROWS, SIZE] uint8 with random bytes."""
    assert ROWS * SIZE > 10 * GAP_BYTES
    return torch.randint(256, (ROWS, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def file(table: torch.Tensor, tmp_path: Path) -> Iterator[DiskFile]:
    """A file that ends with the table, written by direct I/O where that is possible."""
    file = DiskFile(tmp_path / "table.bin", OFFSET + table.nbytes, IOPool())
    file.write(OFFSET, table.view(-1))
    file.sync()
    yield file
    file.close()
    file.pool.close()


@pytest.mark.parametrize("cached", [table_rows.CACHED_BYTES, 5 * (SIZE + GAP_BYTES), 1])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.sets(st.integers(0, ROWS - 1)))
def test_rows_are_those_asked_for(
    cached: int, rows: set[int], table: torch.Tensor, file: DiskFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, five at a time, one by one."""
    monkeypatch.setattr(table_rows, "CACHED_BYTES", cached)
    wanted = sorted(rows)
    into = torch.zeros(len(wanted), SIZE, dtype=torch.uint8)
    assert read_rows(file, OFFSET, wanted, into) == len(wanted) * SIZE
    assert torch.equal(into, table[wanted])


def test_nothing_stays_in_the_page_cache(file: DiskFile) -> None:
    into = torch.empty(3, SIZE, dtype=torch.uint8)
    read_rows(file, OFFSET, [0, 90, ROWS - 1], into)
    assert resident_pages(file.path) <= 1, "the last block is no whole one"


def test_what_is_written_anew_is_read_anew(table: torch.Tensor, file: DiskFile) -> None:
    into = torch.empty(2, SIZE, dtype=torch.uint8)
    for change in (1, 2):
        file.write(OFFSET, (table + change).view(-1))
        read_rows(file, OFFSET, [5, 150], into)
        assert torch.equal(into, table[[5, 150]] + change)


def test_a_file_that_was_cut_is_named(file: DiskFile) -> None:
    os.truncate(file.path, OFFSET + 100 * SIZE)
    with pytest.raises(StorageError, match=r"table\.bin .*changed from outside"):
        read_rows(file, OFFSET, [3, 150], torch.empty(2, SIZE, dtype=torch.uint8))
