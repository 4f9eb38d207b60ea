"""oLLM: named, with the reason why it is not run."""

from __future__ import annotations

from typing import Any

from harness.baselines.base import Baseline, Generated, Ids, Job, Unsupported


class OllmLayers(Baseline):
    """Declared only; a comparison shows the reason in its row."""

    name = "ollm"
    title = "oLLM"
    choices = (
        "Streams layers from disk with KV cache on disk, on a CUDA device. Listed so that it is not "
        "thought forgotten."
    )
    not_run = (
        "oLLM 1.0.3 requires flash-attn, whose source needs the CUDA compiler to be installed, and loads "
        "only the checkpoints that it names itself, so that it cannot read the same weights"
    )

    def load(self, job: Job) -> dict[str, Any]:
        """Never gets this far."""
        raise Unsupported(self.not_run)

    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """Never gets this far."""
        raise Unsupported(self.not_run)
