"""A PEFT adapter: low-rank changes of a model's weights, merged into them as `peft` does.

    W + scale * B @ A      linear [out, in]; of a Conv1D, which is kept turned, (B @ A) turned
    W + scale * (B @ A).T  embedding [vocabulary, width]

with scale = alpha / r, or alpha / sqrt(r) where the settings say ``use_rslora``. Tensors that the adapter
holds whole (``modules_to_save``, biases) take the place of the model's. Whatever else an adapter can be is
refused by name: nothing of it is ever left out in silence.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from engine.errors import CheckpointError, ModelError
from engine.models.adapter import LayeredModel
from engine.models.formats.headers import read_header
from engine.models.formats.settings import ADAPTER_CONFIG, pattern_of, read_settings
from engine.models.weight_files import Reader
from engine.units import MIB

_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?$")
_WHOLE = re.compile(r"(.+?)(?:(\.base_layer)|\.modules_to_save)?(?:\.default)?\.(weight|bias)$")

_READ = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type", "init_lora_weights",
    # decided by the kind of module, or by which tensors there are
    "fan_in_fan_out", "target_modules", "exclude_modules", "modules_to_save", "bias", "layers_to_transform",
    "layers_pattern", "ensure_weight_tying",
    # of training, or of where it came from
    "lora_dropout", "inference_mode", "task_type", "base_model_name_or_path", "auto_mapping", "revision",
    "peft_version", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
"""Settings that merging obeys or that do not change it; any other that is set is refused."""

_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Beginnings of initialisations that take something away from the base's own weights."""


@dataclass(frozen=True)
class _Change:
    """What the adapter does to one tensor of the model: two factors, or a tensor in its place."""

    names: Mapping[str, str]
    """Names in the file by part: ``A`` and ``B``, maybe ``base`` for the base's own; or ``whole``."""

    module: str
    is_embedding: bool = False


class Adapter:
    """An adapter's folder.

    Attributes:
        folder: where it is.
        digest: SHA-256 of its settings and weights.
    """

    def __init__(self, folder: Path) -> None:
        """Read and check settings and header; no weights yet.

        Raises:
            ModelError: if it is none, or of a kind that is not merged.
        """
        self.folder = folder
        if not (folder / ADAPTER_CONFIG).is_file():
            raise ModelError(f"adapter {folder} has no {ADAPTER_CONFIG}: give the folder that peft wrote")
        self._settings = read_settings(folder, ADAPTER_CONFIG)
        self._check_settings()
        files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
        path = next((file for file in files if file.is_file()), None)
        if path is None:
            raise CheckpointError(f"adapter {folder} has no adapter_model.safetensors: download it again")
        self._entries = read_header(path)
        self._changes: dict[str, _Change] = {}
        for name in self._entries:
            self._add(name)
        for target, change in self._changes.items():
            if "whole" not in change.names and not change.names.keys() >= {"A", "B"}:
                raise CheckpointError(
                    f"adapter {folder} has one of the two factors of {target!r}: download it again"
                )
        digest = hashlib.sha256((folder / ADAPTER_CONFIG).read_bytes())
        with path.open("rb") as file:
            while chunk := file.read(16 * MIB):
                digest.update(chunk)
        self.digest = f"sha256:{digest.hexdigest()}"

    def _check_settings(self) -> None:
        kind = str(self._settings.get("peft_type")).upper()
        refused = "" if kind == "LORA" else kind
        start = self._settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            refused = refused or f"init_lora_weights={start}, which changes the base, too"
        for key, value in self._settings.items():
            if key not in _READ and value not in (None, False, [], {}, ""):
                refused = refused or f"{key}={str(value)[:40]}"
        if refused:
            raise ModelError(
                f"adapter {self.folder} is not plain LoRA ({refused}), which is not supported: merge it with "
                "peft's merge_and_unload and give the folder that save_pretrained writes"
            )
        for key in ("r", "lora_alpha"):
            value = self._settings.get(key, 8)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
                raise ModelError(f"adapter {self.folder} has {key}={value!r}: it is a number above 0")

    def _add(self, name: str) -> None:
        """Note what a tensor of the file is for."""
        own = name.removeprefix(_PREFIX)
        factor, whole = _PART.fullmatch(own), _WHOLE.fullmatch(own)
        if factor:
            module, target, part = factor[1], f"{factor[1]}.weight", factor[3]
        elif whole and ".lora_" not in own:
            module, target, part = whole[1], f"{whole[1]}.{whole[3]}", "base" if whole[2] else "whole"
        else:
            raise CheckpointError(
                f"tensor {name!r} of adapter {self.folder} is none of LoRA's: it cannot be merged"
            )
        before = self._changes.get(target)
        names = {part: name} if before is None else {**before.names, part: name}
        if before is not None and (part in before.names or "whole" in names):
            raise CheckpointError(f"adapter {self.folder} changes {target!r} twice: it cannot be merged")
        embedding = bool(factor and factor[2]) or (before is not None and before.is_embedding)
        self._changes[target] = _Change(names, module, embedding)

    def targets(self, model: LayeredModel) -> frozenset[str]:
        """Names, in a model's state dict, of the tensors that it changes.

        Raises:
            CheckpointError: if the model lacks one, or ties it to another.
        """
        state = model.model.state_dict()
        tied = {*model.aliases, *model.aliases.values()}
        for target in self._changes:
            if target not in state:
                raise CheckpointError(
                    f"adapter {self.folder} changes {target!r}, which {type(model.model).__name__} lacks: "
                    "it belongs to another model, or to a part that is kept fused with others"
                )
            if target in tied:
                raise CheckpointError(
                    f"adapter {self.folder} changes {target!r}, which the model ties to another tensor: "
                    "merge it with peft's merge_and_unload, which decides what becomes of both"
                )
        return frozenset(self._changes)

    def merged(self, model: LayeredModel, target: str, weight: Tensor) -> Tensor:
        """A tensor of the model with the change, computed in float32 and kept in the tensor's own kind.

        Args:
            weight: [out, in] as the base has it, or [out] of a bias.

        Raises:
            CheckpointError: if the change has another shape.
        """
        change = self._changes[target]
        with Reader() as reader:
            parts = {part: reader.read(self._entries[name], name) for part, name in change.names.items()}
        if "whole" in parts:
            self._require(parts["whole"].shape == weight.shape, target, parts["whole"], weight)
            return parts["whole"].to(weight.dtype)
        base = parts.get("base", weight)
        self._require(base.shape == weight.shape, target, base, weight)
        weight = base.to(weight.dtype)
        first, second = parts["A"].float(), parts["B"].float()
        rank, scale = self._scale(change.module)
        fits = first.dim() == second.dim() == 2 and first.shape[0] == second.shape[1] == rank
        self._require(fits, target, parts["A"], weight)
        delta = second @ first
        module = model.model.get_submodule(change.module)
        if change.is_embedding or isinstance(module, Conv1D):
            delta = delta.t()
        self._require(delta.shape == weight.shape, target, delta, weight)
        return (weight.float() + scale * delta).to(weight.dtype)

    def _scale(self, module: str) -> tuple[float, float]:
        """Rank of a module's factors, and what their product is multiplied by."""
        rank, alpha = (
            self._of(module, key, pattern) for key, pattern in (("r", "rank"), ("lora_alpha", "alpha"))
        )
        return rank, alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else rank)

    def _of(self, module: str, key: str, pattern: str) -> float:
        """A setting of one module: the first pattern's that fits the end of its name, else the adapter's."""
        for text, value in (self._settings.get(f"{pattern}_pattern") or {}).items():
            try:
                found = pattern_of(rf"(?:.*\.)?(?:{text})$").match(module)
            except ValueError as error:
                raise ModelError(
                    f"adapter {self.folder}: {pattern}_pattern has {text[:80]!r}: {error}"
                ) from None
            if found:
                return float(value)
        return float(self._settings.get(key, 8))

    def _require(self, fits: bool, target: str, part: Tensor, weight: Tensor) -> None:
        if not fits:
            raise CheckpointError(
                f"adapter {self.folder} changes {target!r} of shape {list(weight.shape)} by one of shape "
                f"{list(part.shape)}: it belongs to another model, or its rank is not as its settings say"
            )
