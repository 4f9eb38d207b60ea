#!/usr/bin/env python
"""Measure the Triton kernels on a CUDA device beside what torch does without packing.

    python benchmarks/cuda_kernels.py
    python benchmarks/cuda_kernels.py --formats 4 flexgen best4 --width 8192 --rows 8192
    python benchmarks/cuda_kernels.py --tiny        # in Triton's interpreter, without a GPU: no speeds

unpack and pack in GB/s of the fp16 side, beside the rate of a copy; the product of few rows beside
F.linear, and attention of one new token beside scaled_dot_product_attention, both in fp16.
Exit code 0: measured. 2: there is no CUDA device or no Triton.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        options.rows, options.width = 32, 128
        options.sequences, options.tokens, options.heads, options.groups, options.head_width = 2, 70, 4, 2, 16
    import torch

    from engine.kernels.cuda import gpu

    try:
        import triton
    except ImportError:
        print("error: Triton is not installed; torch's CUDA builds bring it", file=sys.stderr)
        return 2
    if not options.tiny and not gpu.available():
        print("error: torch sees no CUDA device; --tiny runs in Triton's interpreter", file=sys.stderr)
        return 2
    name = "Triton's interpreter" if options.tiny else torch.cuda.get_device_name()
    print(f"device {name}, torch {torch.__version__}, triton {triton.__version__}")
    options.device = "cpu" if options.tiny else "cuda"
    for text in options.formats:
        _matrix(text, options)
    for text in options.kv_formats:
        _attention(text, options)
    return 0


def _matrix(text: str, options: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F

    from engine.kernels.calls import PackedMatrix
    from engine.kernels.cuda import gpu
    from engine.spec.quant import QuantSpec

    spec = QuantSpec.parse(text)
    weight = torch.randn(options.rows, options.width, dtype=torch.float16, device=options.device)
    data = torch.empty(
        spec.blocks(options.rows), spec.block_bytes(options.width), dtype=torch.uint8, device=options.device
    )
    gpu.pack(weight, spec, data)
    matrix, out = PackedMatrix(data, spec, options.rows, options.width), torch.empty_like(weight)
    print(f"\nweights {text}: [{options.rows}, {options.width}], {spec.bits_per_value():g} bits per value")
    for what, call in (
        ("copy", lambda: out.copy_(weight)),
        ("unpack", lambda: gpu.unpack(data, spec, out)),
        ("pack", lambda: gpu.pack(weight, spec, data)),
    ):
        seconds = _seconds(call, options)
        print(f"  {what:<22} {seconds * 1e6:9.1f} us {weight.nbytes / seconds / 1e9:9.1f} GB/s of fp16")
    for count in options.batch:
        x = torch.randn(count, options.width, dtype=torch.float16, device=options.device)
        plain = _seconds(lambda x=x: F.linear(x, weight), options)
        packed = _seconds(lambda x=x: gpu.matmul(x, matrix), options)
        _beside(f"product of {count} rows", packed, "F.linear", plain)


def _attention(text: str, options: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F

    from engine.kernels.calls import AttentionCall, AttentionOptions, CachedSequence, HeadShape
    from engine.kernels.cuda import gpu
    from engine.spec.kv_format import KVFormat

    form = KVFormat.parse(text)
    shape = HeadShape(options.heads, options.groups, options.head_width, options.head_width)
    packed_tokens = form.packed_tokens(options.tokens - 1)
    kind: dict[str, Any] = {"dtype": torch.float16, "device": options.device}
    size = packed_tokens // form.block_tokens * form.block_bytes(shape.keys, shape.values)
    sequences = [
        CachedSequence(
            torch.zeros(size, dtype=torch.uint8, device=options.device),
            packed_tokens,
            torch.randn(options.tokens - packed_tokens, shape.keys + shape.values, **kind),
        )
        for _ in range(options.sequences)
    ]
    query = torch.randn(options.sequences, shape.heads, shape.key_width, **kind)
    out = torch.empty_like(query)
    keys = torch.randn(options.sequences, shape.groups, options.tokens, shape.key_width, **kind)
    values = torch.randn_like(keys)
    scores = AttentionOptions(shape.key_width**-0.5)
    call = AttentionCall(query, keys, values, shape, scores, out)  # whose keys and values are not read
    packed = _seconds(lambda: gpu.attention(call, sequences, form), options)
    plain = _seconds(
        lambda: F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True), options
    )
    print(
        f"\nKV cache {text}: {options.sequences} sequences of {options.tokens} tokens, "
        f"{shape.heads} heads over {shape.groups}, {shape.key_width} wide"
    )
    _beside("attention", packed, "SDPA", plain)


def _beside(what: str, packed: float, other: str, plain: float) -> None:
    times = f"{packed * 1e6:9.1f} us, {other} {plain * 1e6:9.1f} us"
    print(f"  {what:<22} {times}: {plain / packed:.2f} times as fast")


def _seconds(call: Callable[[], object], options: argparse.Namespace) -> float:
    """The median of many calls with a cold cache; the time of one in the interpreter."""
    if options.tiny:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    from triton.testing import do_bench

    return float(do_bench(call, warmup=50, rep=300, return_mode="median")) / 1e3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in Triton's interpreter on the CPU")
    parser.add_argument(
        "--formats", nargs="+", default=["4", "best4", "flexgen", "3", "w8a8"], help="of weights"
    )
    parser.add_argument("--kv-formats", nargs="+", default=["4", "kivi", "kivi2"], help="of the KV cache")
    parser.add_argument("--rows", type=int, default=4096, help="output features (default %(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="input features (default %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="rows of activations")
    parser.add_argument("--sequences", type=int, default=64, help="sequences (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each (default %(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="query heads (default %(default)s)")
    parser.add_argument("--groups", type=int, default=8, help="key-value heads (default %(default)s)")
    parser.add_argument("--head-width", type=int, default=128, help="width of a head (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
