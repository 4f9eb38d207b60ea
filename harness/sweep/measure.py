"""Measures one format with its engine: likelihoods through the KV cache, divergence, bytes, speed.

It knows the engine and the file of full precision's logits, and nothing of HELM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.divergence import ComparedPositions, LogitComparison, LogitFile
from engine.errors import BudgetError, DamagedFileError, StorageError
from engine.limits import OtherWork
from engine.spec.hardware import Tier
from engine.spec.policy import Policy
from engine.spec.record import StoredRecord
from engine.spec.request import Output, Request
from harness.engines.protocol import OnLogits, SweepEngine
from harness.progress.line import Progress
from harness.sweep import points as kept
from harness.sweep.items import Item, Kind

BLOCK_SHAPE = (512, 32)
"""Prompt and new tokens of the largest block, as in the FlexGen paper; clipped to the model's window."""

_UNLIMITED_WINDOW = 2048
"""Window of a model that sets no limit."""

_SPEED_SEQUENCES, _SPEED_PROMPT, _SPEED_NEW = 32, 128, 32

Likelihoods = Mapping[Kind, kept.Likelihood]


def window_of(engine: SweepEngine) -> int:
    """Positions of the model's window."""
    return engine.spec.max_positions or _UNLIMITED_WINDOW


def record_reference(
    engine: SweepEngine, items: Sequence[Item], path: Path, progress: Progress, label: str
) -> Likelihoods:
    """Ask the reference about the items, and keep the logits of those that are compared in a file.

    Raises:
        StorageError: if they cannot be written.
    """
    places = _places(items)
    if not places.rows:
        return _ask(engine, items, None, progress, label)
    file = LogitFile(path, places)
    found = _ask(engine, items, file, progress, label)
    file.finish()
    return found


def compare(
    engine: SweepEngine, items: Sequence[Item], path: Path, progress: Progress, label: str
) -> tuple[Likelihoods, kept.Divergence | None]:
    """Ask a format about the items, and compare its logits with those in the file.

    Raises:
        StorageError: if the file is damaged; it is removed, so that the next sweep makes it again.
    """
    places = _places(items)
    if not places.rows:
        return _ask(engine, items, None, progress, label), None
    try:
        compared = LogitComparison(path, places)
        found = _ask(engine, items, compared, progress, label)
    except DamagedFileError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"the logits of full precision in {path} were damaged and are removed: run again"
        ) from error
    mean = kept.Divergence(float(compared.kl.mean()), float(compared.agree.mean()), places.rows)
    return found, mean


def speed_requests(items: Sequence[Item], policy: Policy, window: int) -> list[Request]:
    """What is generated to measure speed: the same for every format of a curve."""
    new = max(1, min(_SPEED_NEW, window // 4))
    chosen = items[: min(_SPEED_SEQUENCES, policy.block_size)]
    return [Request(item.prompt[: min(_SPEED_PROMPT, window - new)], max_new_tokens=new) for item in chosen]


def measure_rate(engine: SweepEngine, requests: Sequence[Request]) -> tuple[float, float | None]:
    """Generated tokens per second of all passes, those over the prompts included; weights are loaded before.

    Returns:
        The rate, and how many cores other processes kept busy meanwhile; None where the system does not say.
    """
    engine.answer([Request(requests[0].prompt, max_new_tokens=1)])
    before = engine.record().totals
    with OtherWork() as others:
        engine.answer(requests)
    after = engine.record().totals
    seconds = after.seconds - before.seconds
    return (after.generated_tokens - before.generated_tokens) / max(seconds, 1e-9), others.cores


def measure_storage(
    engine: SweepEngine, policy: Policy, stored: StoredRecord, limits: Mapping[Tier, int]
) -> kept.Storage:
    """Bytes as stored, and the largest block that fits the limits.

    Args:
        stored: of the engine's record when the items had been asked, which are the same for all formats.
        limits: most bytes of each tier, the same for all formats.
    """
    window = window_of(engine)
    new = min(BLOCK_SHAPE[1], max(1, window // 16))
    prompt = min(BLOCK_SHAPE[0], window - new)
    try:
        largest = engine.largest_block(prompt, new, limits)
    except BudgetError:
        largest = 0
    return kept.Storage(
        weight_bytes=stored.weight_bytes,
        parameters=engine.spec.num_parameters,
        kv_bytes_per_token=stored.kv_bytes_per_token,
        kv_values_per_token=sum(keys + values for keys, values in engine.spec.kv_widths),
        kv_tokens=stored.kv_tokens,
        largest_block=largest,
        block_prompt=prompt,
        block_new=new,
        block_size=policy.block_size,
        limits={tier.value: count for tier, count in limits.items()},
    )


def _ask(
    engine: SweepEngine,
    items: Sequence[Item],
    logits: LogitFile | LogitComparison | None,
    progress: Progress,
    label: str,
) -> Likelihoods:
    """Compute every continuation with its likelihood, and pass the logits on."""

    def on_logits(index: int, position: int, rows: Any) -> None:
        if logits is not None:
            logits.add(index, position, rows)

    outputs = _answer(engine, items, on_logits, progress, label)
    found: dict[Kind, kept.Likelihood] = {}
    for kind in dict.fromkeys(item.kind for item in items):
        own = [(i, item) for i, item in enumerate(items) if item.kind == kind]
        found[kind] = kept.Likelihood(
            nll=[-sum(outputs[i].logprobs) for i, _ in own],
            tokens=[len(item.forced) for _, item in own],
            greedy=[all(outputs[i].greedy) for i, _ in own],
        )
    return found


def _answer(
    engine: SweepEngine, items: Sequence[Item], on_logits: OnLogits, progress: Progress, label: str
) -> list[Output]:
    progress.begin(label, len(items))
    requests = [item.request for item in items]
    outputs = engine.answer(requests, on_progress=progress.follow, on_logits=on_logits)
    progress.end()
    return outputs


def _places(items: Sequence[Item]) -> ComparedPositions:
    """Rows of the logits of the items that are compared."""
    counts = tuple(len(item.forced) if item.compared else 0 for item in items)
    return ComparedPositions(tuple(item.position for item in items), counts)
