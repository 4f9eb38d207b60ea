"""Petals: named, with the reason why it is not run."""

from __future__ import annotations

from typing import Any

from harness.baselines.base import Baseline, Generated, Ids, Job, Unsupported


class PetalsSwarm(Baseline):
    """Declared only; a comparison shows the reason in its row."""

    name = "petals"
    title = "Petals"
    choices = "Set beside others by the figures that the FlexGen paper measured, labelled as published."
    not_run = (
        "Petals spreads layers over a swarm of machines; its newest release (2.2.0.post1) pins "
        "transformers below 4.35, and a swarm of one machine measures nothing of what it is for"
    )

    def load(self, job: Job) -> dict[str, Any]:
        """Never gets this far."""
        raise Unsupported(self.not_run)

    def generate(self, prompts: Ids, new_tokens: int) -> Generated:
        """Never gets this far."""
        raise Unsupported(self.not_run)
