"""Reconstruction error of formats of about four bits on the same weights: ours and other libraries'.

    python -m benchmarks.reconstruction --model scenarios/demo/model
    pip install torchao gguf hqq      # peers; a missing one is skipped and named

Every peer runs its own quantisation. Printed are the squared error relative to the weights' power, over all
matrices of a checkpoint's layers and over synthetic ones with light and heavy tails, and the bits per value,
scales and offsets included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from engine.kernels.backend import kernels_for
from engine.spec.quant import QuantSpec

KERNELS = kernels_for(torch.device("cpu"))

OURS = ["4", "4-mse", "4-g32-symmetric", "4-g32-symmetric-mse", "best4", "flexgen"]

Rounding = Callable[[Tensor], Tensor]
"""Quantises and dequantises a matrix [rows, inputs] float32."""


def ours(text: str) -> Rounding:
    """One of our formats."""
    spec = QuantSpec.parse(text)

    def run(matrix: Tensor) -> Tensor:
        rows, width = matrix.shape
        packed = torch.empty(spec.blocks(rows), spec.block_bytes(width), dtype=torch.uint8)
        return KERNELS.unpack(KERNELS.pack(matrix, spec, packed), spec, torch.empty_like(matrix))

    return run


def ggml(kind: str) -> Rounding:
    """llama.cpp's formats, by its own Python package."""
    from gguf import GGMLQuantizationType, quants

    chosen = GGMLQuantizationType[kind]
    return lambda matrix: torch.from_numpy(quants.dequantize(quants.quantize(matrix.numpy(), chosen), chosen))


def torchao(group: int, symmetric: bool) -> Rounding:
    """torchao's weight-only int4."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
    from torchao.quantization.granularity import PerGroup

    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(group), mapping_type=mapping, scale_dtype=torch.float16
    )

    def run(matrix: Tensor) -> Tensor:
        layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(matrix.clone(), requires_grad=False)
        quantize_(layer, config)
        return layer.weight.dequantize().float()

    return run


def hqq(group: int) -> Rounding:
    """HQQ with its solver."""
    from hqq.core.quantize import Quantizer

    def run(matrix: Tensor) -> Tensor:
        packed, meta = Quantizer.quantize(
            matrix, nbits=4, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
        )
        return Quantizer.dequantize(packed, meta).float()

    return run


PEERS: dict[str, tuple[float, Callable[[], Rounding]]] = {
    "llama.cpp Q4_0": (4.5, lambda: ggml("Q4_0")),
    "llama.cpp Q4_1": (5.0, lambda: ggml("Q4_1")),
    "torchao int4 g32 symmetric": (4.5, lambda: torchao(32, True)),
    "torchao int4 g64 asymmetric": (4.5, lambda: torchao(64, False)),
    "HQQ g64": (4.5, lambda: hqq(64)),
}
"""Bits per value with 16-bit scales and offsets, and a function that makes the rounding."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder with safetensors")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sets = synthetic() | ({args.model.name or "model": checkpoint(args.model)} if args.model else {})
    runs: list[tuple[str, float, Rounding]] = [
        (text, QuantSpec.parse(text).bits_per_value(), ours(text)) for text in OURS
    ]
    for name, (bits, make) in PEERS.items():
        try:
            runs.append((name, bits, make()))
        except ImportError as error:
            print(f"{name}: not run, {error.name} is not installed")
    print(f"{'format':30}{'bits':>6}" + "".join(f"{name:>14}" for name in sets))
    found = {}
    for name, bits, run in runs:
        errors = found[name] = {kind: relative_error(run, matrices) for kind, matrices in sets.items()}
        print(f"{name:30}{bits:6.2f}" + "".join(f"{error:14.6f}" for error in errors.values()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def relative_error(run: Rounding, matrices: list[Tensor]) -> float:
    """Squared error / squared values over all matrices [rows, inputs]."""
    lost = sum(float((run(matrix).double() - matrix.double()).square().sum()) for matrix in matrices)
    return lost / sum(float(matrix.double().square().sum()) for matrix in matrices)


def synthetic() -> dict[str, list[Tensor]]:
    """Random matrices [512, 2048] with light and heavy tails."""
    torch.manual_seed(0)
    return {
        "normal": [torch.randn(512, 2048)],
        "Laplace": [torch.distributions.Laplace(0.0, 1.0).sample((512, 2048))],
        "Student t5": [torch.distributions.StudentT(5.0).sample((512, 2048))],
    }


def checkpoint(folder: Path) -> list[Tensor]:
    """The matrices of a checkpoint's layers whose inputs are whole groups of 64."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if ".layers." in name and tensor.dim() == 2 and tensor.shape[1] % 64 == 0:
                    found.append(tensor.float())
    return found


if __name__ == "__main__":
    main()
