"""Equality checks of the engine on any device: against `transformers`, and against the engine on the CPU.

Needs torch, transformers, safetensors, accelerate and numpy; no HELM and no pytest.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.engine import Engine
from engine.spec.policy import Policy
from engine.spec.request import Output, Request
from tests.support.agreement import TOLERANCE
from tests.support.engine_models import NEW_TOKENS, Expected, full_forwards, make_family, prompts

FAMILIES = (
    "opt",
    "llama",
    "mistral",
    "mixtral",
    "qwen3",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "phi3",
    "gpt_oss",
    "deepseek_v3",
)
PLACEMENTS = {
    "resident": "weights=device",
    "host": "weights=host,kv=host,activations=host",
    "disk": "weights=disk,kv=disk,activations=disk",
    "mixed": "weights=0.3/0.3/0.4,kv=0.4/0.3/0.3,activations=0.3/0.4/0.3",
}
COMPRESSIONS = {
    "weights at 4 bits": ("weight_quant=4", TOLERANCE),
    # A key between two codes can be rounded to either: devices sum in different orders.
    "KV cache at 4 bits": ("kv_quant=4", 0.02),
    "both at 4 bits": ("weight_quant=4,kv_quant=4", 0.02),
}
BLOCK = "device_batch=3,num_device_batches=2"


@dataclass(frozen=True)
class Check:
    """One comparison of all prompts' answers."""

    family: str
    what: str
    worst: float
    """Largest difference of a log-probability."""

    tolerance: float
    wrong_tokens: int
    """Answers with other tokens although the log-probabilities differ by more than the tolerance."""

    @property
    def passed(self) -> bool:
        """Whether the answers are equal within the tolerance."""
        return not self.wrong_tokens and self.worst <= self.tolerance


def checks(device: str, family: str, offload_dir: Path | None = None) -> Iterator[Check]:
    """Compare one family in every placement, with both schedules, and at 4 bits.

    Args:
        device: what the engine runs on; ``transformers`` runs on the same (``pretend`` is the CPU).
        offload_dir: where temporary files go; the system's temporary folder by default.
    """
    with tempfile.TemporaryDirectory(prefix="equality-", dir=offload_dir) as scratch:
        folder = Path(scratch) / family
        model = make_family(family, folder).model.to("cpu" if device == "pretend" else device)
        expected = [full_forwards(model, prompt, NEW_TOKENS) for prompt in prompts()]
        for (placement, text), schedule in itertools.product(
            PLACEMENTS.items(), ("sequential", "overlapped")
        ):
            outputs = _answers(folder, f"{text},schedule={schedule}", device)
            yield _compare(family, f"{placement}, {schedule}", expected, outputs, TOLERANCE)
        for what, (text, tolerance) in COMPRESSIONS.items():
            on_cpu = [_as_expected(output) for output in _answers(folder, text, "cpu")]
            for placement in ("resident", "mixed"):
                outputs = _answers(folder, f"{PLACEMENTS[placement]},{text}", device)
                yield _compare(family, f"{what}, {placement}", on_cpu, outputs, tolerance)


def _answers(folder: Path, policy: str, device: str) -> list[Output]:
    requests = [Request(prompt, NEW_TOKENS, prompt_logprobs=True) for prompt in prompts()]
    chosen = Policy.parse(f"{policy},{BLOCK}")
    with Engine(folder, chosen, device=device, offload_dir=folder.parent / "offload") as engine:
        return engine.answer(requests)


def _as_expected(output: Output) -> Expected:
    return Expected(output.tokens, output.logprobs, output.prompt_logprobs or ())


def _compare(
    family: str, what: str, expected: Sequence[Expected], outputs: Sequence[Output], tolerance: float
) -> Check:
    worst, wrong = 0.0, 0
    for one, other in zip(expected, outputs, strict=True):
        same = next(
            (i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b), NEW_TOKENS
        )
        pairs = [*zip(one.logprobs[: same + 1], other.logprobs, strict=False)]
        pairs += zip(one.prompt_logprobs, other.prompt_logprobs or (), strict=True)
        difference = max((abs(a - b) for a, b in pairs), default=0.0)
        # Two tokens that are equally probable within the tolerance may change places.
        wrong += same < NEW_TOKENS and difference > tolerance
        worst = max(worst, difference)
    return Check(family, what, worst, tolerance, wrong)


def full_precision() -> None:
    """Switch TF32 off on CUDA, so that only the order of additions makes a difference."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
