"""The accuracy of weight formats on one model, over many random draws instead of one.

    python -m benchmarks.format_draws --model scenarios/demo/model --text memos.txt --draws 12

A format rounds one model's weights in one way, and the loss is partly chance. Here the rows and columns of
every matrix are permuted before groups are formed and restored after rounding, which gives any number of
draws of the same format. Printed per format: relative squared error of the weights, and mean and standard
error over the draws of KL(full || format) and of the change of the negative log-likelihood per token of the
text. Plain `transformers` computes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.kernels.backend import kernels_for
from engine.spec.quant import QuantSpec

KERNELS = kernels_for(torch.device("cpu"))

FORMATS = [
    "flexgen", "4", "4-mse", "4-column-mse", "4-g32-symmetric", "4-g32-symmetric-mse",
    "4-g32-symmetric-column", "best4",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=48)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor(tokenizer.encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False))
    count = min(args.windows, len(ids) // args.window)
    ids = ids[: count * args.window].view(count, args.window)
    matrices = {
        name: parameter for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.dim() == 2
    }  # fmt: skip
    exact = {name: parameter.detach().clone() for name, parameter in matrices.items()}
    full = log_probabilities(model, ids)
    print(f"{count} windows of {args.window} tokens, {args.draws} draws; nats x 1000, +- standard error")
    for text in args.formats:
        spec = QuantSpec.parse(text)
        error, divergences, changes = 0.0, [], []
        for draw in range(args.draws):
            for name, rounded in drawn(exact, spec, draw):
                error += float((rounded - exact[name]).square().sum())
                matrices[name].data.copy_(rounded)
            found = log_probabilities(model, ids)
            divergences.append(1e3 * float((full.exp() * (full - found)).sum(-1).mean()))
            changes.append(1e3 * float((chosen(full, ids) - chosen(found, ids)).mean()))
        power = args.draws * sum(float(matrix.square().sum()) for matrix in exact.values())
        print(
            f"{text:28} bits {spec.bits_per_value():.2f}  error {error / power:.5f}  "
            f"KL {shown(divergences)}  NLL {shown(changes)}", flush=True,
        )  # fmt: skip


def drawn(exact: dict[str, Tensor], spec: QuantSpec, draw: int) -> Iterator[tuple[str, Tensor]]:
    """Every matrix [rows, columns], rounded in this draw's random order; draw 0 permutes nothing."""
    generator = torch.Generator().manual_seed(draw)
    for name, matrix in exact.items():
        rows, columns = (
            torch.randperm(size, generator=generator) if draw else torch.arange(size) for size in matrix.shape
        )
        mixed = matrix[rows][:, columns].contiguous()
        packed = torch.empty(spec.blocks(len(mixed)), spec.block_bytes(mixed.shape[1]), dtype=torch.uint8)
        kept = KERNELS.unpack(KERNELS.pack(mixed, spec, packed), spec, torch.empty_like(mixed))
        out = torch.empty_like(matrix)
        out[rows[:, None], columns[None]] = kept
        yield name, out


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities [windows, tokens - 1, vocabulary] of ids [windows, tokens]."""
    return torch.log_softmax(model(ids).logits[:, :-1], dim=-1)


def chosen(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [windows, tokens - 1, 1] of the tokens of ids [windows, tokens] after the first."""
    return logprobs.gather(-1, ids[:, 1:, None])


def shown(values: list[float]) -> str:
    """Mean and standard error as text."""
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):+7.2f} +- {spread:.2f}"


if __name__ == "__main__":
    main()
