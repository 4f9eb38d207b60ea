"""Random values: the same bits from C and from torch, whole or in pieces, and nearly normal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kernels import random
from engine.kernels.cpu import build

quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
streams = st.integers(0, 2**64 - 1)
KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
VARIANTS = {"this machine": build.OPTIONAL_FLAGS[0], "portable": ("-O2",)}


@pytest.fixture(scope="module", params=VARIANTS, autouse=True)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernel for this machine, and without vector instructions and OpenMP."""
    try:
        compiler = build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("kernels")
    for name in ("random.c", "formats.h", "simd.h"):
        shutil.copy(build.SOURCES / name, folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(build, "SOURCES", folder)
    made = build.compile_library(compiler, folder, [VARIANTS[request.param]])
    patch.setattr(build, "_loaded", [(build.Library(str(made)), "")])
    yield
    patch.undo()


@quick
@given(
    streams,
    st.one_of(st.integers(0, 2**40), st.integers(2**32 - 2000, 2**32)),
    st.integers(0, 3000),
    st.sampled_from(KINDS),
    st.sampled_from((0.02, 1.0, 1e-6, 300.0)),
    st.integers(1, 3),
)
def test_the_reference_is_repeated_bit_by_bit(
    stream: int, start: int, count: int, dtype: torch.dtype, deviation: float, threads: int
) -> None:
    made = random.fill(stream, start, torch.full((count,), 7.0, dtype=dtype), deviation, threads)
    expected = random.reference(stream, start, torch.full((count,), 3.0, dtype=dtype), deviation)
    assert torch.equal(made.view(torch.uint8), expected.view(torch.uint8))


def test_pieces_make_the_whole_whatever_the_threads() -> None:
    whole = random.fill(5, 0, torch.empty(300, 333), threads=3)
    pieces = torch.empty(300 * 333)
    for begin in (70_000, 0, 99_000, 1234):
        ends = sorted(at for at in (0, 1234, 70_000, 99_000, len(pieces)) if at > begin)
        random.fill(5, begin, pieces[begin : ends[0]], threads=1)
    assert torch.equal(whole.view(-1), pieces)


def test_more_than_a_piece_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random.fill(11, 2**32 - 100, torch.empty(500))
    monkeypatch.setattr(random, "_PIECE", 64)
    assert torch.equal(random.reference(11, 2**32 - 100, torch.empty(500)), whole)
    double = random.fill(11, 2**32 - 100, torch.empty(500, dtype=torch.float64))
    assert torch.equal(double, whole.double())


@pytest.mark.parametrize("stream", [0, 1, 2**63, 2**64 - 1])
def test_values_are_nearly_normal(stream: int) -> None:
    count = 1 << 20
    values = random.fill(stream, 0, torch.empty(count), 0.5).double() / 0.5
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.std() - 1) < 0.005
    assert abs((values**3).mean()) < 0.02
    assert abs((values**4).mean() - 2.7) < 0.03, "3 of a normal distribution, 2.7 of four uniform summands"
    assert 3 < values.abs().max() <= 2 * 3**0.5
    for lag in (1, 2, 3, 64, 4096, 12288):
        assert abs((values[lag:] * values[:-lag]).mean()) < 5 / count**0.5, lag


def test_streams_share_nothing() -> None:
    """Streams are independent at equal and at shifted places, and so are the blocks of one stream."""
    count = 1 << 18
    base = random.fill(42, 0, torch.empty(count)).double()
    others = [(43, 0), (42 + 2**32, 0), (42, 2**32), (2**63 + 42, 0), (42, 2**33 + 1)]
    for stream, start in others:
        other = random.fill(stream, start, torch.empty(count)).double()
        spectrum = torch.fft.rfft(base).conj() * torch.fft.rfft(other)
        correlations = torch.fft.irfft(spectrum) / count
        assert correlations.abs().max() < 7 / count**0.5, (stream, start)


def test_without_a_library_the_reference_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random.fill(9, 17, torch.empty(1000, dtype=torch.bfloat16))
    monkeypatch.setattr(build, "_loaded", [(None, "switched off")])
    assert torch.equal(random.fill(9, 17, torch.empty(1000, dtype=torch.bfloat16)), made)


def test_memory_that_c_cannot_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        random.fill(0, 0, torch.empty(8, 8).t())
