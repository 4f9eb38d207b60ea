"""Matrices that stay in 16-bit floats: single values are exact, sums are in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import PolicyError
from engine.kernels import reference, reference_attention
from engine.kernels.backend import kernels_for
from engine.kernels.calls import PackedMatrix
from engine.kernels.cpu import native
from engine.kernels.cuda import gpu
from engine.spec.float_format import FLOAT_KINDS, FloatSpec
from tests.engine.kernels.cpu.native_inputs import noise, quick

# The library is chosen per module and not changed by any test.

kinds = pytest.mark.parametrize("kind", FLOAT_KINDS)


def float_matrix(weight: Tensor, kind: str, shift: int = 0, gap: int = 0) -> tuple[PackedMatrix, Tensor]:
    """A weight in 16 bits and its values in float64.

    Args:
        shift: bytes between an aligned address and the weight.
        gap: bytes between its rows.
    """
    rows, width = weight.shape
    rounded = weight.to(getattr(torch, kind))
    memory = torch.full((shift + rows * (2 * width + gap),), 0xA5, dtype=torch.uint8)
    data = memory[shift:].view(rows, 2 * width + gap)[:, : 2 * width]
    data.copy_(rounded.view(torch.uint8))
    return PackedMatrix(data, FloatSpec(kind), rows, width), rounded.double()


def every_number(kind: str) -> Tensor:
    """All 65536 numbers of a kind, including both zeros, subnormals, infinities and NaN."""
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(getattr(torch, kind))


@kinds
def test_a_matrix_of_floats_is_sized_as_the_file_holds_it(kind: str) -> None:
    spec = FloatSpec(kind)
    assert (spec.blocks(7), spec.block_bytes(5), spec.nbytes(7, 5), str(spec)) == (7, 10, 70, kind)
    with pytest.raises(PolicyError, match="float16 or bfloat16"):
        FloatSpec("float32")


@pytest.mark.usefixtures("library")
@kinds
@pytest.mark.parametrize("shift", [0, 2, 5])
def test_every_number_is_unpacked_exactly(kind: str, shift: int) -> None:
    values = every_number(kind)[: 199 * 329].view(199, 329)  # no whole vectors
    memory = torch.zeros(values.nbytes + shift, dtype=torch.uint8)
    data = memory[shift:].view(199, -1)
    data.copy_(values.view(torch.uint8))
    for threads in (1, 3):
        out = torch.full((199, values.shape[1] + 1), 9.0)
        native.unpack(data, FloatSpec(kind), out[:, :-1], threads)
        expected = values.float()
        assert torch.equal(out[:, :-1].isnan(), expected.isnan())
        assert torch.equal(out[:, :-1].nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(out[:, :-1].signbit() | expected.isnan(), expected.signbit() | expected.isnan())
        assert (out[:, -1] == 9).all()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", range(1, 40))
def test_the_last_tile_is_of_any_height(rows: int) -> None:
    matrix, weight = float_matrix(noise(rows, 530), "float16")
    x = noise(16, 530, seed=1)
    found = native.matmul(x, matrix)
    torch.testing.assert_close(found, (x.double() @ weight.T).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("library")
@quick
@given(
    st.sampled_from(FLOAT_KINDS), st.integers(0, 70), st.integers(1, 150), st.integers(1, 300),
    st.booleans(), st.booleans(), st.sampled_from(((0, 0), (2, 0), (6, 14), (1, 3))), st.integers(1, 3),
)  # fmt: skip
def test_products(
    kind: str, tokens: int, rows: int, width: int, biased: bool, scaled: bool, place: tuple[int, int],
    threads: int,
) -> None:  # fmt: skip
    matrix, weight = float_matrix(noise(rows, width), kind, *place)
    x, divisor = noise(tokens, width + 3, seed=1)[:, :width], noise(width, seed=3).abs() + 0.5
    if scaled:
        matrix = PackedMatrix(matrix.data, matrix.spec, rows, width, input_scale=divisor)
    bias = noise(rows, seed=2) if biased else None
    expected = F.linear(
        (x / divisor if scaled else x).double(), weight, None if bias is None else bias.double()
    )
    out = torch.full((tokens, rows + 2), 9.0)
    native.matmul(x, matrix, bias, out=out[:, :rows], threads=threads)
    torch.testing.assert_close(out[:, :rows].double(), expected, rtol=1e-5, atol=1e-4)
    assert (out[:, rows:] == 9).all()


@pytest.mark.usefixtures("library")
@kinds
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 513, 600])
def test_products_of_any_number_of_tokens(tokens: int, kind: str) -> None:
    """Whole chunks of columns and a remainder, and more tokens than are computed at once."""
    matrix, weight = float_matrix(noise(67, 1405), kind)
    x = noise(tokens, 1405, seed=1)
    for threads in (1, 3):
        got = native.matmul(x, matrix, threads=threads)
        torch.testing.assert_close(got.double(), x.double() @ weight.T, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("library")
@kinds
def test_what_is_not_finite_stays_so(kind: str) -> None:
    weight = noise(20, 40)
    weight[3, 7], weight[11, 39] = float("inf"), float("nan")
    matrix, _ = float_matrix(weight, kind)
    for tokens in (1, 4, 12):
        got = native.matmul(torch.ones(tokens, 40), matrix)
        assert (got[:, 3] == float("inf")).all() and got[:, 11].isnan().all()
        assert torch.isfinite(got[:, [0, 2, 4, 10, 12, 19]]).all()


@kinds
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("place", [(0, 0), (2, 6), (3, 1)])
def test_what_the_engine_calls(
    kind: str, fast: bool, place: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(native, "available", lambda: False)
    kernels = kernels_for(torch.device("cpu"))
    matrix, weight = float_matrix(noise(70, 45), kind, *place)
    bias, ids = noise(70, seed=2), torch.tensor([[3, 69, 3], [0, 64, 63]])
    for x in (noise(2, 3, 45, seed=1), noise(11, 45, seed=4), noise(0, 45), noise(45)):
        got = kernels.matmul(x, matrix, bias)
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), F.linear(x.double(), weight, bias.double()), rtol=1e-5, atol=1e-5
        )
    assert torch.equal(kernels.embedding(ids, matrix, torch.float32), F.embedding(ids, weight.float()))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        out = kernels.unpack(matrix.data, matrix.spec, torch.empty(70, 45, dtype=dtype))
        assert torch.equal(out, weight.to(dtype))
        assert kernels.embedding(ids, matrix, dtype).dtype == dtype


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products_of_a_device_that_computes_in_16_bits(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without kernels of ours, so the same calls run on any device."""
    matrix, weight = float_matrix(noise(24, 64), kind)
    x, bias = noise(5, 64, seed=1).to(dtype), noise(24, seed=2).to(dtype)
    expected = F.linear(x, weight.to(dtype), bias)
    unpacked: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "unpack", lambda *given, real=gpu.unpack: unpacked.append(given) or real(*given))
        assert torch.equal(gpu.matmul(x, matrix, bias), expected)
    assert len(unpacked) == (str(dtype) != f"torch.{kind}")
    assert torch.equal(reference_attention.matmul(x, matrix, bias), expected)
    assert torch.equal(gpu.unpack(matrix.data, matrix.spec, torch.empty_like(weight)), weight)


def test_odd_addresses_are_copied_and_even_ones_are_not() -> None:
    even, _ = float_matrix(noise(4, 8), "float16", 2, 4)
    odd, weight = float_matrix(noise(4, 8), "float16", 3, 4)
    spec = FloatSpec("float16")
    assert reference.floats(even.data, spec).data_ptr() == even.data.data_ptr()
    assert torch.equal(reference.floats(odd.data, spec).double(), weight)
