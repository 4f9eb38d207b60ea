"""Train the demo model: ``python -m scenarios.demo.train`` (about 20 minutes on one core).

It trains an OPT of one million parameters from scratch, in fp32 on the CPU: rows of 128, then 256, then 512
tokens, Muon on the matrices and AdamW on the rest, one cosine schedule. It writes a checkpoint to resume from
and a log to ``--work-dir``, and exports an fp16 transformers folder to ``--export`` at every checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from scenarios.demo.documents import Batch, DocumentSource
from scenarios.demo.helm_instances import helm_inputs
from scenarios.demo.muon import Muon
from scenarios.demo.tokenizer import save_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result, except software versions."""

    steps: int = 2600
    batch_tokens: int = 2048
    positions: int = 512
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    feed_forward: int = 512
    muon_rate: float = 5e-3
    adam_rate: float = 3e-3
    decay: float = 0.05
    warmup: float = 0.02
    """Fraction of the steps over which the rates rise; then they follow a cosine to zero."""
    clip: float = 1.0
    seed: int = 0

    def stage(self, step: int) -> tuple[int, float]:
        """(row length, difficulty) at a step: a fifth of the steps at 128, a fifth at 256, then 512."""
        done = step / self.steps
        return (128, 0.3) if done < 0.2 else (256, 0.8) if done < 0.4 else (512, 1.0)

    def rate(self, step: int) -> float:
        """Factor of the learning rates at a step."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def build_model(recipe: Recipe, vocabulary: int) -> OPTForCausalLM:
    """An untrained OPT of the recipe's shape, with weights from its seed and positions from sinusoids.

    With learned positions that start as sinusoids, a head can find "the token before" at any distance from
    the beginning, even at positions that the short rows of the first stages never train.
    """
    torch.manual_seed(recipe.seed)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=vocabulary,
            hidden_size=recipe.hidden,
            word_embed_proj_dim=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            ffn_dim=recipe.feed_forward,
            max_position_embeddings=recipe.positions,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )
    )
    table = model.model.decoder.embed_positions.weight.data  # [positions + OPT's offset, hidden]
    count, width = table.shape
    rates = torch.exp(-math.log(recipe.positions) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(count)[:, None] * rates
    table.copy_(0.1 * torch.cat([angles.sin(), angles.cos()], dim=1))
    return model


class Trainer:
    """The model, its optimisers and the step counter: everything that is in a checkpoint."""

    def __init__(self, recipe: Recipe, source: DocumentSource) -> None:
        self.recipe, self.source = recipe, source
        self.model = build_model(recipe, source.tokenizer.get_vocab_size()).train()
        matrices = [p for n, p in self.model.named_parameters() if ".layers." in n and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, recipe.muon_rate, decay=recipe.decay),
            torch.optim.AdamW(rest, recipe.adam_rate, betas=(0.9, 0.98), weight_decay=recipe.decay),
        ]
        self.full_rates = [recipe.muon_rate, recipe.adam_rate]
        self.step = 0
        self.tokens = 0
        """Tokens trained on: those with a weight in the loss."""
        self.cpu_seconds = 0.0

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns the mean loss of all weighted tokens and of the answers."""
        recipe, started = self.recipe, time.process_time()
        length, difficulty = recipe.stage(self.step)
        batch = self.source.batch(self.step, recipe.seed, recipe.batch_tokens, length, difficulty)
        for optimizer, rate in zip(self.optimizers, self.full_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * recipe.rate(self.step)
            optimizer.zero_grad(set_to_none=True)
        loss, answer_loss = self._losses(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.tokens += int((batch.weights > 0).sum())
        self.cpu_seconds += time.process_time() - started
        return {"loss": loss.item(), "answer_loss": answer_loss.item(), "length": length}

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(input_ids=batch.input_ids, use_cache=False).logits  # [rows, length, vocabulary]
        targets, weights = batch.input_ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
        answers = weights == 1.0
        return (losses * weights).sum() / weights.sum(), losses[answers].mean().detach()

    def save(self, path: Path) -> None:
        """Write everything needed to resume, replacing the file in one step."""
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
            "cpu_seconds": self.cpu_seconds,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        """Continue from a file written by `save`; a file of another recipe is refused."""
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"error: {path} is from another recipe: delete it or choose another --work-dir")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.cpu_seconds = state["step"], state["tokens"], state["cpu_seconds"]

    def export(self, folder: Path) -> None:
        """Write the transformers folder: fp16 weights, config, tokenizer."""
        half = build_model(self.recipe, self.source.tokenizer.get_vocab_size())
        half.load_state_dict(self.model.state_dict())
        half.half().save_pretrained(folder)
        save_tokenizer(self.source.tokenizer, folder, self.recipe.positions)


def run(
    trainer: Trainer, work_dir: Path, export: Path | None, checkpoint_every: int, log_every: int = 25
) -> None:
    """Train to the recipe's end, with a log and checkpoints."""
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = work_dir / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    recent: list[dict[str, float]] = []
    with open(work_dir / "training_log.jsonl", "a", encoding="utf-8") as log:
        while trainer.step < trainer.recipe.steps:
            recent.append(trainer.train_step())
            last = trainer.step == trainer.recipe.steps
            if trainer.step % log_every == 0 or last:
                line = {
                    "step": trainer.step,
                    "tokens": trainer.tokens,
                    "row_length": recent[-1]["length"],
                    "loss": round(sum(r["loss"] for r in recent) / len(recent), 4),
                    "answer_loss": round(sum(r["answer_loss"] for r in recent) / len(recent), 4),
                    "cpu_seconds": round(trainer.cpu_seconds, 1),
                }
                print(json.dumps(line), file=log, flush=True)
                print(json.dumps(line), flush=True)
                recent = []
            if trainer.step % checkpoint_every == 0 or last:
                trainer.save(checkpoint)
                if export:
                    trainer.export(export)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m scenarios.demo.train", description=__doc__)
    parser.add_argument(
        "--work-dir", type=Path, default=Path("results/demo_training"), help="checkpoint and log"
    )
    parser.add_argument(
        "--export", type=Path, default=Path(__file__).parent / "model", help="transformers folder"
    )
    parser.add_argument(
        "--steps", type=int, default=Recipe.steps, help="optimiser steps of the whole schedule"
    )
    parser.add_argument("--checkpoint-every", type=int, default=200, metavar="STEPS")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = train_tokenizer()
    trainer = Trainer(Recipe(steps=options.steps), DocumentSource(tokenizer, helm_inputs()))
    run(trainer, options.work_dir, options.export, options.checkpoint_every)


if __name__ == "__main__":
    main()
