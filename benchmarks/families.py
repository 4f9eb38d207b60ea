"""The whole engine against `transformers` over model families, as tiny random models on disk.

    python benchmarks/families.py                      # every family of the installed transformers
    python benchmarks/families.py falcon gemma4 bloom  # some of them

What `run_helm.py models` tries is the architecture check alone; here every answer passes through the tiers,
under several policies, with prompts longer than windows and chunks.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.script import run
from engine.engine import Engine
from engine.errors import TierbenchError
from engine.families import class_of, default_config, family_types
from engine.models.check.shrink import twin_config
from engine.models.check.tiny import text_state, tiny_model
from engine.models.decoder.parts import text_config
from engine.spec.policy import Policy

PROMPT_LENGTHS = (5, 17, 40, 90)
NEW_TOKENS = 6
TOLERANCE = 1e-4
POLICIES = {
    "resident": ("", "cpu"),
    "offloaded": ("weights=0/0.1/0.9,kv=0/0/1,device_batch=2", "cpu"),
    "sequential": (
        "weights=0/0.5/0.5,kv=0/0.5/0.5,activations=0/0/1,device_batch=3,schedule=sequential",
        "cpu",
    ),
    "apart": ("weights=0/0.5/0.5,kv=0.3/0.3/0.4,device_batch=2,num_device_batches=2", "pretend"),
}
"""Policy and device, by name."""


@dataclass(frozen=True)
class Result:
    """What became of one family."""

    verdict: str
    """``equal``, ``wrong``, ``crash``, ``refused``, or ``not built`` where transformers itself cannot."""

    detail: str


def answers(model: Any, prompt: list[int]) -> tuple[list[int], list[float], list[float]]:
    """Greedy tokens by full forwards, their log-probabilities, and those of the prompt's tokens."""
    ids, chosen = list(prompt), []
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
            ids.append(int(scores[-1].argmax()))
            chosen.append(scores[-1, ids[-1]].item())
        own = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].float().log_softmax(-1)
    return ids[len(prompt) :], chosen, [own[i, token].item() for i, token in enumerate(prompt[1:])]


def compare(model_type: str, folder: Path) -> Result:
    """Build, save, answer both ways."""
    try:
        config = twin_config(default_config(model_type))
        model = tiny_model(config)
        generator = torch.Generator().manual_seed(11)
        prompts = [
            torch.randint(3, 100, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS
        ]
        expected = [answers(model, prompt) for prompt in prompts]
        model.save_pretrained(folder, state_dict=text_state(model))
    except Exception as error:
        return Result("not built", f"{type(error).__name__}: {str(error).splitlines()[:1]}")
    worst = 0.0
    for name, (policy, device) in POLICIES.items():
        chosen = Policy.parse(policy) if policy else Policy()
        try:
            with Engine(
                folder, chosen, device=device, offload_dir=folder / "off", store=folder / "store"
            ) as engine:
                outputs, scores = engine.generate(prompts, NEW_TOKENS), engine.score(prompts)
        except TierbenchError as error:
            return Result("refused", str(error))
        except Exception as error:
            return Result("crash", f"{name}: {type(error).__name__}: {error}")
        for output, score, (tokens, chosen_scores, own) in zip(outputs, scores, expected, strict=True):
            pairs = [*zip(output.logprobs, chosen_scores, strict=True), *zip(score, own, strict=True)]
            difference = max(abs(a - b) for a, b in pairs)
            worst = max(worst, difference)
            if list(output.tokens) != tokens or not difference < TOLERANCE:
                return Result("wrong", f"{name}: log-probabilities differ by {difference:.2g}")
    return Result("equal", f"{worst:.1e}")


def main() -> int:
    """Compare the families named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="config types; default: all")
    types = parser.parse_args().types or family_types()
    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for model_type in types:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(model_type, Path(folder))
        try:
            config = default_config(model_type)
            is_wrapper = text_config(config) is not config
        except Exception:
            is_wrapper = False
        counts[is_wrapper][result.verdict] += 1
        print(
            f"{result.verdict:9} {model_type:28} {class_of(model_type):44} {result.detail[:150]}", flush=True
        )
    for is_wrapper, found in counts.items():
        print("wrappers:" if is_wrapper else "text models:", dict(found))
    return 1 if any(found["wrong"] or found["crash"] for found in counts.values()) else 0


if __name__ == "__main__":
    run(main)
