"""The Triton kernels against the references: in Triton's interpreter on the CPU, and on a CUDA device.

The interpreter has to be chosen before Triton is first imported, so one test runs this file again in
a process of its own. There all checks run on the CPU; here they run where there is a CUDA device.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels import reference, reference_attention
from engine.kernels.calls import AttentionOptions, CachedSequence, HeadShape, PackedMatrix
from engine.kernels.cuda import gpu
from engine.spec.kv_format import KVFormat
from engine.spec.quant import Along, Offset, QuantSpec
from tests.engine.kernels.cpu.native_inputs import attention_call

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

FORMATS = [
    QuantSpec(bits, size, offset, along)
    for bits, size in ((2, 32), (3, 64), (4, 24), (8, 8))
    for offset in Offset
    for along in Along
] + [QuantSpec.parse(text) for text in ("3-g8", "3-g8-column", "4-row", "8-g256-symmetric", "2-g192-zero")]

KINDS = (torch.float32, torch.float16, torch.bfloat16)


def kinds_of(spec: QuantSpec) -> tuple[torch.dtype, ...]:
    """All kinds; in the slow interpreter float32 and one of the others, in turn from format to format."""
    return (KINDS[0], KINDS[1 + FORMATS.index(spec) % 2]) if INTERPRETED else KINDS


SHAPES = {
    "a head is two groups": HeadShape(heads=4, groups=2, key_width=32, value_width=16),
    "heads cut groups": HeadShape(heads=6, groups=2, key_width=12, value_width=20),
    "odd heads": HeadShape(heads=3, groups=3, key_width=5, value_width=7),
}


@pytest.fixture(params=["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_checks_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="runs in a process of its own")
def test_benchmark_runs_in_the_interpreter() -> None:
    script = Path(__file__).parents[4] / "benchmarks" / "cuda_kernels.py"
    command = [sys.executable, script, "--tiny", "--formats", "3", "w8a8", "--kv-formats", "kivi"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(word in run.stdout for word in ("unpack", "weights w8a8", "product of 64 rows", "attention"))


def noise(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def packed_by(values: Tensor, spec: QuantSpec) -> Tensor:
    rows, width = values.shape
    return reference.pack(
        values, spec, torch.empty(spec.blocks(rows), spec.block_bytes(width), dtype=torch.uint8)
    )


def sizes(spec: QuantSpec) -> tuple[int, int]:
    """Rows and width that are not multiples of the group."""
    return (5, 203) if spec.along is Along.ROW else (spec.group_size + 13, 21)


def assert_same_bytes(got: Tensor, want: Tensor, spec: QuantSpec, width: int) -> None:
    """All codes and all numbers are equal, except for the sign of zeros."""
    end = spec.code_bytes(width)
    assert torch.equal(got[:, :end], want[:, :end])
    numbers, wanted = (packed[:, end:].clone().view(torch.float16) for packed in (got, want))
    assert torch.equal(numbers, wanted)


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_unpacked_values_are_the_references(spec: QuantSpec, device: str) -> None:
    rows, width = sizes(spec)
    packed = packed_by(noise(rows, width), spec)
    for kind in kinds_of(spec):
        want = reference.unpack(packed, spec, torch.empty(rows, width, dtype=kind))
        got = torch.full((rows, width + 2), 7, dtype=kind, device=device)
        gpu.unpack(packed.to(device), spec, got[:, 1:-1])
        truncates = INTERPRETED and kind == torch.bfloat16  # as the interpreter does, which a device does not
        torch.testing.assert_close(got[:, 1:-1].cpu(), want, rtol=2.0**-7 if truncates else 0, atol=0)
        assert bool((got[:, [0, -1]] == 7).all())


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_packed_bytes_are_the_references(spec: QuantSpec, device: str) -> None:
    rows, width = sizes(spec)
    values = noise(rows, width)
    values[:, 8:16] = 0.25  # groups, or parts of them, that are constant or tiny
    values[:, 16:18] *= 1e-6
    values[:, 20] = values[:, 20].abs() + 100
    for kind in kinds_of(spec):
        part = values.to(kind)
        whole = torch.zeros(rows, width + 3, dtype=kind, device=device)
        whole[:, 1:-2] = part
        got = torch.zeros(spec.blocks(rows), spec.block_bytes(width), dtype=torch.uint8, device=device)
        gpu.pack(whole[:, 1:-2], spec, got)
        assert_same_bytes(got.cpu(), packed_by(part, spec), spec, width)


def test_blocks_may_start_at_odd_addresses(device: str) -> None:
    spec, (rows, width) = QuantSpec(4, 8), (3, 16)
    values = noise(rows, width)
    data = torch.zeros(rows, spec.block_bytes(width) + 1, dtype=torch.uint8, device=device)
    gpu.pack(values.to(device), spec, data[:, 1:])
    assert_same_bytes(data[:, 1:].cpu(), packed_by(values, spec), spec, width)
    got = gpu.unpack(data[:, 1:], spec, torch.empty(rows, width, device=device))
    assert torch.equal(got.cpu(), reference.unpack(packed_by(values, spec), spec, torch.empty(rows, width)))


def test_error_fit_is_the_references(device: str) -> None:
    spec, values = QuantSpec.parse("4-g32-mse"), noise(4, 64)
    got = torch.empty(4, spec.block_bytes(64), dtype=torch.uint8, device=device)
    gpu.pack(values.to(device), spec, got)
    torch.testing.assert_close(
        gpu.unpack(got, spec, torch.empty(4, 64, device=device)).cpu(),
        reference.unpack(packed_by(values, spec), spec, torch.empty(4, 64)),
        rtol=0, atol=0.02,
    )  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e6])
@pytest.mark.parametrize("text", ["4", "4-symmetric", "4-zero", "4-g32-column"])
def test_what_cannot_be_packed_is_refused(text: str, bad: float, device: str) -> None:
    spec, values = QuantSpec.parse(text), noise(16, 70)
    values[11, 66] = bad
    out = torch.empty(spec.blocks(16), spec.block_bytes(70), dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="not finite or beyond"):
        gpu.pack(values.to(device), spec, out)
    values[11, 66] = 0
    gpu.pack(values.to(device), spec, out)


def test_a_minimum_beyond_fp16_is_refused_though_its_scale_is_zero(device: str) -> None:
    out = torch.empty(1, QuantSpec().block_bytes(64), dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="not finite or beyond"):
        gpu.pack(torch.full((1, 64), 1e5, device=device), QuantSpec(), out)


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_few_rows_times_a_packed_matrix(
    spec: QuantSpec, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just wide enough for the sum to be split in two: the interpreter's time grows with the width."""
    rows, width = (37, 523) if spec.along is Along.ROW else (spec.group_size + 13, 463)
    if spec.along is Along.ROW and spec.group(width) < 64:
        width = 8 * spec.group_size + 11
    splits, real = [], gpu._splits
    monkeypatch.setattr(gpu, "_splits", lambda *sizes: splits.append(real(*sizes)) or splits[-1])
    data = packed_by(noise(rows, width), spec)
    matrix = PackedMatrix(data, spec, rows, width)
    on_device = PackedMatrix(data.to(device), spec, rows, width)
    x, bias = noise(5, width, seed=1), noise(rows, seed=2)
    got = gpu.matmul(x.to(device), on_device, bias.to(device))
    want = reference_attention.matmul(x, matrix, bias)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-4)
    assert splits[0] > 1


@pytest.mark.parametrize("rows_of_x", [1, 16, 17, 40])
def test_any_number_of_rows_and_smoothed_activations(
    rows_of_x: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, scale = QuantSpec(), noise(64).abs() + 0.5
    data = packed_by(noise(24, 64), spec)
    x = noise(rows_of_x, 64, seed=1)
    want = reference_attention.matmul(x, PackedMatrix(data, spec, 24, 64, scale))
    matrix = PackedMatrix(data.to(device), spec, 24, 64, scale.to(device))
    unpacked: list[object] = []
    monkeypatch.setattr(gpu, "unpack", lambda *given, real=gpu.unpack: unpacked.append(given) or real(*given))
    got = gpu.matmul(x.to(device), matrix)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
    assert len(unpacked) == (rows_of_x > 16)
    half = gpu.matmul(x.to(device, torch.float16), matrix)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.cpu().float(), want, rtol=0.01, atol=0.1)


@pytest.mark.parametrize(("count", "rows", "width"), [(1, 16, 64), (33, 13, 75), (5, 3, 8)])
def test_product_of_rounded_activations_is_exact(count: int, rows: int, width: int, device: str) -> None:
    spec = QuantSpec.parse("w8a8")
    data, x, bias = packed_by(noise(rows, width), spec), noise(count, width, seed=1), noise(rows, seed=2)
    x[0] = 0
    want = reference_attention.matmul(x, PackedMatrix(data, spec, rows, width), bias)
    matrix = PackedMatrix(data.to(device), spec, rows, width)
    got = gpu.matmul(x.to(device), matrix, bias.to(device))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("count", "rows", "width"), [(1, 16, 64), (33, 13, 75), (5, 3, 8)])
def test_product_of_rounded_activations_and_4_bits(count: int, rows: int, width: int, device: str) -> None:
    spec = QuantSpec.parse("w4a8")
    data, x = packed_by(noise(rows, width), spec), noise(count, width, seed=1)
    want = reference_attention.matmul(x, PackedMatrix(data, spec, rows, width))
    got = gpu.matmul(x.to(device), PackedMatrix(data.to(device), spec, rows, width))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        want,
        reference_attention.matmul(x, PackedMatrix(data, spec.replace(activation_bits=16), rows, width)),
        atol=1e-4,
    )


def cached(
    count: int, form: KVFormat, shape: HeadShape, device: str, kind: torch.dtype, seed: int
) -> tuple[CachedSequence, CachedSequence]:
    """A sequence of ``count`` tokens on the CPU and on the device."""
    tokens = noise(count, shape.keys + shape.values, seed=seed)
    packed_tokens = form.packed_tokens(count - 1)
    blocks = []
    for block in tokens[:packed_tokens].split(form.block_tokens):
        for part, spec in ((block[:, : shape.keys], form.keys), (block[:, shape.keys :], form.values)):
            blocks.append(packed_by(part, spec).flatten())
    packed = torch.cat(blocks) if packed_tokens else torch.empty(0, dtype=torch.uint8)
    rows = tokens[packed_tokens:].to(kind)
    return (
        CachedSequence(packed, packed_tokens, rows),
        CachedSequence(packed.to(device), packed_tokens, rows.to(device)),
    )


def assert_attends_alike(
    text: str, shape: HeadShape, options: AttentionOptions, device: str,
    kind: torch.dtype = torch.float32, tolerance: float = 1e-5, counts: tuple[int, ...] = (1, 40, 100),
) -> None:  # fmt: skip
    form = KVFormat.parse(text)
    both = [cached(count, form, shape, device, kind, seed) for seed, count in enumerate(counts)]
    query = noise(len(counts), shape.heads, shape.key_width, seed=9).to(kind)
    empty = query.new_empty(len(counts), shape.heads, shape.value_width)
    call = attention_call(query, shape, options, empty)
    want = reference_attention.attention(call, [host for host, _ in both], form)
    if options.sinks is not None:
        options = AttentionOptions(options.scale, softcap=options.softcap, sinks=options.sinks.to(device))
    out = torch.empty_like(empty, device=device)
    call = attention_call(query.to(device), shape, options, out)
    got = gpu.attention(call, [there for _, there in both], form)
    assert got is out
    torch.testing.assert_close(got.cpu(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    "text", ["4-g16", "kivi", "3-g8/2-symmetric+5", "8-row/4-g24-zero", "2-g24-channel/3-g24-channel-zero+3"]
)
def test_attention_over_packed_tokens(text: str, shape: HeadShape, device: str) -> None:
    assert_attends_alike(text, shape, AttentionOptions(0.3), device)


@pytest.mark.parametrize("programs", [1, 512], ids=["whole", "split"])
@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(0.3, window=1),
        AttentionOptions(0.3, window=90),
        AttentionOptions(1.0, softcap=3.0),
        AttentionOptions(0.3, sinks=noise(4)),
        AttentionOptions(0.3, fraction=0.2),
    ],
    ids=["own token only", "window", "softcap", "sinks", "fraction"],
)
def test_what_changes_the_scores(
    options: AttentionOptions, programs: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    shape = SHAPES["a head is two groups"]
    longest = 540 if programs > 1 else 150  # several tiles; to be split, several for each part
    assert_attends_alike("4-g16-channel/4-g16+20", shape, options, device, counts=(1, 61, longest))


def test_attention_in_half_precision(device: str) -> None:
    shape = SHAPES["a head is two groups"]
    assert_attends_alike("kivi", shape, AttentionOptions(0.3), device, torch.float16, 5e-3)


def test_numbers_behind_the_last_token_do_not_matter(device: str) -> None:
    """Only some tokens of a block are in use, so the rest of its scales may be NaN."""
    form, shape = KVFormat.parse("4-g8-channel/4-g8"), HeadShape(2, 1, 8, 8)
    sequence, _ = cached(17, form, shape, "cpu", torch.float32, 0)
    packed = sequence.packed.clone()
    packed[-form.values.block_bytes(8) :] = 255
    query, options = noise(1, 2, 8), AttentionOptions(0.3)
    got, want = (
        kernels.attention(
            attention_call(query.to(where), shape, options, torch.empty(1, 2, 8, device=where)),
            [CachedSequence(data.to(where), 15, sequence.rows.to(where))], form,
        ).cpu()
        for kernels, where, data in ((gpu, device, packed), (reference_attention, "cpu", sequence.packed))
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_bytes_of_other_kinds_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="uint8"):
        gpu.unpack(torch.zeros(2, 36, device=device), QuantSpec(), torch.empty(2, 64, device=device))
