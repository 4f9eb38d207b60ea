"""``run_helm.py calibrate``: statistics of a model's activations, by which w8a8 smooths outliers."""

from __future__ import annotations

import argparse

from harness.commands.arguments import add_engine_groups, chosen_policy, say
from harness.commands.flags import COUNT, FILE, add_flag
from harness.engines.auto import is_auto, resolve_policy
from harness.engines.settings import settings_from_args

DESCRIPTION = (
    "Run prompts of your own through a model and keep the largest magnitude of every input channel of "
    "every linear layer. A policy with weight_quant=w8a8,calibration=FILE moves the outliers of the "
    "activations into the weights by it (SmoothQuant) before both are rounded to 8 bits."
)

EPILOG = """\
examples:
  # prompts.txt holds one prompt a line; some dozens that look like the later ones are enough
  run_helm.py calibrate --model scenarios/demo/model --prompts prompts.txt --output demo.safetensors

  # use it
  run_helm.py run --policy resident weight_quant=w8a8,calibration=demo.safetensors -r form_processing -m 20

  # JSON lines with a "prompt" or a "text", at most 128 of them, weights on disk
  run_helm.py calibrate --model scenarios/demo/model --prompts prompts.jsonl --num-samples 128 \\
      --policy offloaded -o demo.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    files = parser.add_argument_group("files")
    prompts = "one prompt a line, or .jsonl with a prompt or text a line"
    add_flag(files, "--prompts", prompts, FILE, required=True)
    add_flag(files, "-o --output", "statistics, safetensors", FILE, required=True)
    how = parser.add_argument_group("workload")
    add_flag(how, "--num-samples", "maximum number of prompts", COUNT, 512)
    add_flag(how, "--max-length", "maximum number of tokens of a prompt", COUNT, 512)
    add_engine_groups(parser)


def execute(args: argparse.Namespace) -> int:
    """Run the prompts and write the statistics."""
    from harness.environment import check_torchvision, require_memory_for
    from harness.sweep.calibrate import calibrate, prompt_requests, read_prompts
    from harness.tokenizer import Text

    prompts = read_prompts(args.prompts, args.num_samples)
    settings, policy = settings_from_args(args), chosen_policy(args)
    require_memory_for("torch")
    check_torchvision()
    text = Text.load(settings.model, settings.trust_remote_code)
    requests = prompt_requests(settings, text, prompts, args.max_length)
    if is_auto(policy):
        policy = resolve_policy(settings, policy, requests, say).policy
    calibrate(settings, policy, requests, args.output)
    print(f"statistics: {args.output}; use them with weight_quant=w8a8,calibration={args.output}")
    return 0
