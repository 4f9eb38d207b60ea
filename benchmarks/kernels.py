#!/usr/bin/env python
"""How fast the C kernels are, next to what torch does with the same numbers in full precision.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --only matmul --repeats 30 --json kernels.json
    python benchmarks/kernels.py --threads 1        # processor time: other programs disturb it little

Every row is a ratio of two times that were taken in turn, so that what else the machine does
falls on both: the median over all repeats, and the middle half of them. Several threads need a quiet
machine: where one of them has to wait for a processor, all do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.kernels.calls import AttentionCall, AttentionOptions, CachedSequence, HeadShape, PackedMatrix
from engine.kernels.cpu import native
from engine.spec.float_format import FLOAT_KINDS, FloatSpec
from engine.spec.kv_format import KVFormat
from engine.spec.precision import VECTOR_ROWS, MatmulPrecision
from engine.spec.quant import QuantSpec

FORMATS = ("4", "4-g32-symmetric-mse", "flexgen", "3", "2", "8", "w8a8", "w4a8")
WITHOUT_INTEGERS = tuple(name for name in FORMATS if QuantSpec.parse(name).activation_bits == 16)
"""Those that differ in how they are packed and unpacked: activations are no matter of the bytes."""

KV_FORMATS = ("4", "kivi")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
SHAPES = ((4096, 4096), (2048, 8192))
WARM_UP = 2


@dataclass(frozen=True)
class KernelRow:
    """One comparison."""

    what: str
    against: str
    rate: float
    """Of the first, in ``unit``."""

    unit: str
    ratio: float
    """How many times as fast as the other, in the median."""

    low: float
    high: float
    """The middle half of the ratios."""

    def __str__(self) -> str:
        rate = f"{self.rate:8.1f} {self.unit}"
        return (
            f"{self.what:44} {rate:18} {self.ratio:6.2f} ({self.low:.2f} to {self.high:.2f}) x {self.against}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    benchmarks = {
        "unpack": unpacking, "pack": packing, "matmul": products, "precision": precisions,
        "attention": attention, "prompts": prompts,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=benchmarks, help="one of the benchmarks; all if left out")
    parser.add_argument("--repeats", type=int, default=15, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's choice if left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    if not native.available():
        print(f"error: {native.reason()}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    instructions = torch.backends.cpu.get_cpu_capability()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {instructions}")
    rows = []
    for name, benchmark in benchmarks.items():
        if options.only in (None, name):
            for row in benchmark(options.repeats):
                print(row, flush=True)
                rows.append(asdict(row))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return 0


def compare(
    what: str, against: str, ours: Callable[[], object], theirs: Callable[[], object], repeats: int,
    amount: float, unit: str,
) -> KernelRow:  # fmt: skip
    """Time two calls in turn; ``amount`` of ``unit`` is what ours does."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[tuple[float, float]] = []
    for _ in range(repeats + WARM_UP):
        begin = clock()
        ours()
        between = clock()
        theirs()
        times.append((between - begin, clock() - between))
    times = times[WARM_UP:]
    low, middle, high = statistics.quantiles((b / a for a, b in times), n=4)
    return KernelRow(what, against, amount / statistics.median(a for a, _ in times), unit, middle, low, high)


def packed(name: str, rows: int, width: int) -> PackedMatrix:
    """A matrix of normal noise."""
    if name in FLOAT_KINDS:
        values = torch.randn(rows, width).to(getattr(torch, name))
        return PackedMatrix(values.view(torch.uint8), FloatSpec(name), rows, width)
    spec = QuantSpec.parse(name)
    data = torch.empty(spec.blocks(rows), spec.block_bytes(width), dtype=torch.uint8)
    return PackedMatrix(native.pack(torch.randn(rows, width), spec, data), spec, rows, width)


def unpacking(repeats: int) -> Iterator[KernelRow]:
    """A matrix into memory, next to the speed at which memory is filled and copied."""
    rows, width = SHAPES[0]
    out, source = torch.zeros(rows, width), torch.zeros(rows, width)
    gigabytes = out.nbytes / 1e9
    for name in WITHOUT_INTEGERS:
        matrix = packed(name, rows, width)

        def unpack(matrix: PackedMatrix = matrix) -> None:
            native.unpack(matrix.data, matrix.spec, out)

        for against, theirs in (("fill_", lambda: out.fill_(1.0)), ("copy_", lambda: out.copy_(source))):
            yield compare(f"unpack {name}", against, unpack, theirs, repeats, gigabytes, "GB/s")


def packing(repeats: int) -> Iterator[KernelRow]:
    """A matrix from memory, next to the speed at which it is read."""
    rows, width = SHAPES[0]
    values = torch.randn(rows, width)
    for name in WITHOUT_INTEGERS:
        spec = QuantSpec.parse(name)
        data = torch.empty(spec.blocks(rows), spec.block_bytes(width), dtype=torch.uint8)

        def pack(spec: QuantSpec = spec, data: Tensor = data) -> None:
            native.pack(values, spec, data)

        yield compare(
            f"pack {name}", "aminmax", pack, lambda: values.aminmax(), repeats, values.numel() / 1e9, "Gel/s"
        )


def multiply(
    x: Tensor, weight: Tensor | PackedMatrix, precision: MatmulPrecision = MatmulPrecision.HIGHEST
) -> Tensor:
    """x times a packed matrix or one of float32, by the C kernels whatever else is faster."""
    if isinstance(weight, PackedMatrix):
        return native.matmul(x, weight, precision=precision)
    return native.linear(x, weight, precision=precision)


def products(repeats: int) -> Iterator[KernelRow]:
    """x times a packed matrix or one of floats, next to the product in float32 by oneDNN and by `F.linear`.

    Next to matrices of floats also FBGEMM's product of weights that it has packed in fp16.
    """
    for rows, width in SHAPES:
        weight = torch.randn(rows, width)
        fbgemm = torch.ops.quantized.linear_prepack_fp16(weight, None)
        for name in ("float32", *FLOAT_KINDS, *FORMATS):
            matrix = None if name == "float32" else packed(name, rows, width)
            for tokens in TOKENS:
                x = torch.randn(tokens, width)

                ours = partial(multiply, x, weight if matrix is None else matrix)

                def onednn(x: Tensor = x, weight: Tensor = weight) -> None:
                    torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

                def linear(x: Tensor = x, weight: Tensor = weight) -> None:
                    F.linear(x, weight)

                def half(x: Tensor = x, fbgemm: object = fbgemm) -> None:
                    torch.ops.quantized.linear_dynamic_fp16(x, fbgemm)

                what, work = f"matmul {name} [{tokens}, {width}] x {rows}", 2e-9 * tokens * rows * width
                yield compare(what, "oneDNN fp32", ours, onednn, repeats, work, "GFLOP/s")
                yield compare(what, "F.linear fp32", ours, linear, repeats, work, "GFLOP/s")
                if name in FLOAT_KINDS:
                    yield compare(what, "FBGEMM fp16", ours, half, repeats, work, "GFLOP/s")


def precisions(repeats: int) -> Iterator[KernelRow]:
    """Products of many tokens on a unit for bfloat16, next to float32's and to torch's in bfloat16."""
    known = [precision for precision in MatmulPrecision if native.has_unit(precision)]
    if not known:
        print("this processor has no unit for bfloat16")
        return
    for rows, width in SHAPES:
        weight = torch.randn(rows, width)
        rounded = weight.bfloat16()
        for name in ("float32", *FLOAT_KINDS, "4"):
            matrix = None if name == "float32" else packed(name, rows, width)
            for tokens in (count for count in TOKENS if count > VECTOR_ROWS):
                x = torch.randn(tokens, width)
                halved = x.bfloat16()
                kept = weight if matrix is None else matrix

                def theirs(x: Tensor = halved, rounded: Tensor = rounded) -> None:
                    F.linear(x, rounded)

                work = 2e-9 * tokens * rows * width
                exact = partial(multiply, x, kept)
                for precision in known:
                    what = f"{precision} {name} [{tokens}, {width}] x {rows}"
                    ours = partial(multiply, x, kept, precision)
                    yield compare(what, "ours in fp32", ours, exact, repeats, work, "GFLOP/s")
                    yield compare(what, "F.linear bf16", ours, theirs, repeats, work, "GFLOP/s")


def attention(repeats: int) -> Iterator[KernelRow]:
    """One query of each of 8 sequences, next to torch's fused attention in float32."""
    count, tokens = 8, 512
    for shape in (HeadShape(32, 32, 128, 128), HeadShape(32, 8, 128, 128)):
        query = torch.randn(count, shape.heads, shape.key_width)
        keys = torch.randn(count, shape.groups, tokens, shape.key_width)
        values = torch.randn(count, shape.groups, tokens, shape.value_width)
        grouped = shape.groups != shape.heads
        out = torch.empty_like(query)

        def torch_attention(
            query: Tensor = query, keys: Tensor = keys, values: Tensor = values, grouped: bool = grouped
        ) -> None:
            F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=grouped)

        for name in KV_FORMATS:
            form = KVFormat.parse(name)
            sequences = [cached(form, shape, tokens) for _ in range(count)]
            bytes_held = sum(s.packed.nbytes + s.rows.nbytes for s in sequences)

            call = AttentionCall(query, keys, values, shape, AttentionOptions(0.1), out)
            attend = partial(native.attention, call, sequences, form)  # reads no keys and values of the call
            ratio = (keys.nbytes + values.nbytes) / bytes_held
            what = f"attention {name}, {shape.heads}/{shape.groups} heads, 1/{ratio:.1f} of the bytes"
            amount = (keys.numel() + values.numel()) / 1e9
            yield compare(what, "SDPA fp32", attend, torch_attention, repeats, amount, "Gel/s")


def prompts(repeats: int) -> Iterator[KernelRow]:
    """512 tokens in prompts of one length to themselves, next to torch's fused attention in float32."""
    known = [precision for precision in MatmulPrecision if native.has_unit(precision)]
    for (heads, groups, width), length in itertools.product(((12, 12, 64), (32, 8, 128)), (32, 128, 512)):
        count = 512 // length
        parts = [torch.randn(512, each, width) for each in (heads, groups, groups)]
        places = [(index * length, length) for index in range(count)]
        out = torch.empty(512, heads, width)
        split = [part.unflatten(0, (count, length)).transpose(1, 2) for part in parts]

        def theirs(split: list[Tensor] = split, grouped: bool = heads != groups) -> None:
            F.scaled_dot_product_attention(*split, is_causal=True, enable_gqa=grouped)

        work = 2e-9 * 512 * (length + 1) * heads * width
        for precision in (MatmulPrecision.HIGHEST, *known):
            options = AttentionOptions(width**-0.5, precision=precision)
            call = AttentionCall(*parts, HeadShape(heads, groups, width, width), options, out)
            ours = partial(native.attend_prompts, call, places)
            what = f"prompts {precision} [{count}, {length}], {heads}/{groups} heads of {width}"
            yield compare(what, "SDPA fp32", ours, theirs, repeats, work, "GFLOP/s")


def cached(form: KVFormat, shape: HeadShape, tokens: int) -> CachedSequence:
    """A sequence of noise, as the format keeps it after its last token."""
    rows = torch.randn(tokens, shape.keys + shape.values)
    count = form.packed_tokens(tokens - 1)
    blocks = torch.empty(
        count // form.block_tokens * form.block_bytes(shape.keys, shape.values), dtype=torch.uint8
    )
    native.pack_tokens([rows[:count]], form, shape.keys, shape.values, [blocks])
    return CachedSequence(blocks, count, rows[count:].clone())


if __name__ == "__main__":
    raise SystemExit(main())
