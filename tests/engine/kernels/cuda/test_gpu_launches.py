"""Arguments of the Triton kernels' launches, which compile for devices that this machine need not have."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.calls import AttentionOptions, CachedSequence, HeadShape, PackedMatrix
from engine.kernels.cuda import gpu
from engine.spec.kv_format import KVFormat
from engine.spec.quant import QuantSpec
from tests.engine.kernels.cpu.native_inputs import attention_call

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


class Launches:
    """Replaces a kernel and records the constants that it would be launched with."""

    def __init__(self) -> None:
        self.constants: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)
        return self.launch

    def launch(self, *arguments: Any, num_stages: int = 3, **constants: Any) -> None:
        self.constants.append(constants)


@pytest.mark.skipif(INTERPRETED, reason="launches nothing")
def test_numbers_at_odd_addresses_are_read_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as halves they would be an error, but only on a device."""
    from engine.kernels.cuda import attention as gpu_attention
    from engine.kernels.cuda import triton_kernels as gpu_kernels

    kernel = Launches()
    monkeypatch.setattr(
        gpu, "_kernels", lambda: SimpleNamespace(PackedLayout=gpu_kernels.PackedLayout, unpack=kernel)
    )
    for bits, size, begin in ((4, 9, 0), (4, 9, 1), (4, 10, 0), (3, 10, 0), (4, 8, 0)):
        spec = QuantSpec(bits, 8)
        gpu.unpack(torch.empty(2, size, dtype=torch.uint8)[:, begin:], spec, torch.empty(2, 8))
    assert [launch["FORM"].even for launch in kernel.constants] == [False, False, True, False, True]

    kernel = Launches()
    module = SimpleNamespace(Constants=gpu_attention.Constants, Tile=gpu_attention.Tile, attend=kernel)
    monkeypatch.setattr(gpu, "_attention_kernels", lambda: module)
    shape, options = HeadShape(1, 1, 8, 8), AttentionOptions(1.0)
    for text, begin in (("3-g8/4", 0), ("4", 1), ("4", 0)):
        data = torch.empty(1024, dtype=torch.uint8)[begin:]
        sequence = CachedSequence(data, 8, torch.empty(1, 16))
        call = attention_call(torch.empty(1, 1, 8), shape, options, torch.empty(1, 1, 8))
        gpu.attention(call, [sequence], KVFormat.parse(text))
    assert [launch["VALUES"].even for launch in kernel.constants] == [False, False, True]
    assert [launch["CONSTANTS"].aligned for launch in kernel.constants] == [True, False, True]


class Compiled(Launches):
    """Replaces a kernel: compiles each launch for a device that this machine need not have."""

    def __init__(self, kernel: Any, capability: int) -> None:
        super().__init__()
        self.kernel, self.capability = kernel, capability

    def launch(self, *arguments: Any, num_stages: int = 3, **constants: Any) -> None:
        super().launch(*arguments, **constants)
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        names = {
            torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
            torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
        }  # fmt: skip
        signature = {
            name: "*" + names[value.dtype] if isinstance(value, Tensor)
            else {int: "i32", float: "fp32"}[type(value)]
            for name, value in zip(self.kernel.arg_names, arguments, strict=False)
        }  # fmt: skip
        source = ASTSource(self.kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        target = GPUTarget("cuda", self.capability, 32)
        built = compile(source, target=target, options={"num_stages": num_stages})
        assert built.metadata.shared <= 72 * 1024


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("kind", "capability"), [(torch.float16, 80), (torch.bfloat16, 90), (torch.float32, 80)]
)
def test_kernels_compile_for_devices(
    kind: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from engine.kernels.cuda import attention as gpu_attention
    from engine.kernels.cuda import triton_kernels as gpu_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    linear = [
        Compiled(kernel, capability) for kernel in (gpu_kernels.pack, gpu_kernels.unpack, gpu_kernels.matmul)
    ]
    attend = Compiled(gpu_attention.attend, capability)
    monkeypatch.setattr(
        gpu, "_kernels",
        lambda: SimpleNamespace(
            PackedLayout=gpu_kernels.PackedLayout, pack=linear[0], unpack=linear[1], matmul=linear[2]
        ),
    )  # fmt: skip
    module = SimpleNamespace(Constants=gpu_attention.Constants, Tile=gpu_attention.Tile, attend=attend)
    monkeypatch.setattr(gpu, "_attention_kernels", lambda: module)
    for text in ("3-zero", "flexgen"):
        spec = QuantSpec.parse(text)
        data = torch.empty(spec.blocks(256), spec.block_bytes(256), dtype=torch.uint8)
        gpu.pack(torch.empty(256, 256, dtype=kind), spec, data)
        gpu.unpack(data, spec, torch.empty(256, 256, dtype=kind))
        gpu.matmul(torch.empty(3, 256, dtype=kind), PackedMatrix(data, spec, 256, 256))
    shape, form = HeadShape(8, 2, 128, 128), KVFormat.parse("kivi")
    sequence = CachedSequence(torch.empty(10**5, dtype=torch.uint8), 128, torch.empty(3, 512, dtype=kind))
    options = AttentionOptions(0.1, softcap=5.0)
    query = torch.empty(1, 8, 128, dtype=kind)
    gpu.attention(attention_call(query, shape, options, torch.empty_like(query)), [sequence], form)
    assert [len(kernel.constants) for kernel in (*linear, attend)] == [2, 2, 2, 1]
