"""Changes to a model's folder, each of one thing that decides answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def weights(folder: Path) -> None:
    """Another lowest bit in the last number."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)


def config(folder: Path) -> None:
    edit(folder / "config.json", layer_norm_elementwise_affine=True, of_no_effect=1)


def tokenizer(folder: Path) -> None:
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


def start_ids(folder: Path) -> None:
    edit(folder / "tokenizer.json", post_processor=None)


def end_ids(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))


def chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )


CHANGES: dict[Callable[[Path], None], tuple[str, ...]] = {
    weights: ("weights or config",),
    config: ("weights or config",),
    tokenizer: ("tokenizer",),
    start_ids: ("start ids",),
    end_ids: ("end ids",),
    chat_template: ("chat template",),
}
"""What is done to a model's folder, and the parts of the identity that change by it."""
