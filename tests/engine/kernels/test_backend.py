"""The kernels chosen for a device: products, embeddings, tokens of the KV cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import reference
from engine.kernels.backend import kernels_for
from engine.kernels.calls import PackedMatrix
from engine.kernels.cpu import native
from engine.spec.kv_format import KVFormat
from engine.spec.precision import MatmulPrecision
from engine.spec.quant import QuantSpec

CPU, HIGHEST = torch.device("cpu"), MatmulPrecision.HIGHEST


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(weight: torch.Tensor, spec: QuantSpec) -> tuple[PackedMatrix, torch.Tensor]:
    """A packed matrix, and its values [R, W] in float32."""
    rows, width = weight.shape
    data = torch.empty(spec.blocks(rows), spec.block_bytes(width), dtype=torch.uint8)
    reference.pack(weight, spec, data)
    return PackedMatrix(data, spec, rows, width), reference.unpack(data, spec, torch.empty(rows, width))


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 512, 513])
@pytest.mark.parametrize("bias", [True, False])
def test_exact_products(rows: int, bias: bool) -> None:
    linear = kernels_for(CPU).linear
    weight, offset = noise(24, 40, seed=1), noise(24, seed=2) if bias else None
    for x in (noise(rows, 40), noise(1, rows, 40), noise(rows, 80)[:, ::2]):
        assert torch.allclose(linear(x, weight, offset, HIGHEST), F.linear(x, weight, offset), atol=1e-5)
    turned = noise(40, 24, seed=3).t()
    assert torch.allclose(linear(x, turned, offset, HIGHEST), F.linear(x, turned, offset), atol=1e-5)


@pytest.mark.parametrize("form", ["4", "3-column", "best4", "8-row"])
def test_products_and_embeddings_of_packed_rows(form: str) -> None:
    matrix, values = packed(noise(70, 48), QuantSpec.parse(form))
    kernels = kernels_for(CPU)
    x = noise(2, 3, 48, seed=1)
    assert torch.allclose(kernels.matmul(x, matrix, None, HIGHEST), F.linear(x, values), atol=1e-5)
    ids = torch.tensor([[3, 69, 3], [0, 64, 63]])
    found = kernels.embedding(ids, matrix, torch.float32)
    assert torch.allclose(found, F.embedding(ids, values), atol=1e-6) and found.shape == (2, 3, 48)


@pytest.mark.parametrize(
    "form",
    [
        "4",
        "float16",
        "2-channel-g8/bfloat16",
        "2-channel-g8/2",
        "3-g32/4-channel-g8",
        "8-channel-g8/3-channel-g8",
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_tokens_of_several_sequences(form: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(native, "available", lambda: False)
    kernels = kernels_for(CPU)
    assert (kernels.pack_tokens is native.pack_tokens) is (fast and native.available())
    kept = KVFormat.parse(form)
    keys, values = 32, 24
    rows = [noise(count * kept.block_tokens, keys + values, seed=count) for count in (1, 3)]
    targets = [
        torch.zeros(len(part) // kept.block_tokens * kept.block_bytes(keys, values), dtype=torch.uint8)
        for part in rows
    ]
    kernels.pack_tokens(rows, kept, keys, values, targets)
    for part, target in zip(rows, targets, strict=True):
        for spec, begin, columns, width in (
            (kept.keys, 0, part[:, :keys], keys),
            (kept.values, kept.key_bytes(keys), part[:, keys:], values),
        ):
            size = spec.nbytes(kept.block_tokens, width)
            blocks = target.view(-1, kept.block_bytes(keys, values))[:, begin : begin + size]
            found = blocks.reshape(-1, spec.block_bytes(width))
            wanted = reference.pack(columns, spec, torch.empty_like(found))
            assert torch.equal(found, wanted)
    rows[1][2, 40] = float("nan")
    with pytest.raises(ValueError, match="finite or beyond"):
        kernels.pack_tokens(rows, kept, keys, values, targets)
