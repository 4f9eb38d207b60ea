"""Where weights come from: a `transformers` checkpoint, streamed tensor by tensor, or random numbers.

Nothing of a checkpoint is executed: safetensors files, or ``.bin`` files through torch's
``weights_only`` loading. Names on disk are mapped to names in the model by transformers' own
conversion rules, one target tensor at a time, so no more than one fused tensor and its parts are in
memory at once.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from engine.errors import CheckpointError, ModelError
from engine.models.adapter import LayeredModel
from engine.units import GIB, MIB, format_bytes

_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_HASH_WHOLE_BELOW = 1 * GIB
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.bin"]


def resolve(model: str) -> Path:
    """The local folder of a model: itself, or a snapshot of the hub repository of that name.

    Raises:
        ModelError: if there is no such folder and the hub does not give it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ModelError(
            f"model {model!r} is not a folder: give a local model folder or a hub name such as org/name"
        )
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        names = list_repo_files(model)
        ignore = ["*.bin"] if any(name.endswith(".safetensors") for name in names) else None
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES, ignore_patterns=ignore))
    except Exception as error:
        try:
            return Path(snapshot_download(model, local_files_only=True))
        except Exception:
            raise ModelError(
                f"model {model!r} is neither a local folder nor to be had from the hub "
                f"({type(error).__name__}): check the name and the network, or give a local folder"
            ) from error


def load_config(model: str, folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the model's config.

    Raises:
        ModelError: if it is missing, malformed, of an unknown type, or wants to run code of its own.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model folder {model} has no config.json: give the folder that save_pretrained wrote"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        hint = (
            "; pass --trust-remote-code to run the code it carries"
            if "trust_remote_code" in str(error)
            else ""
        )
        raise ModelError(f"config.json of {model} cannot be used: {lines[0][:200]}{hint}") from error
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ModelError(
            f"model {model} is already quantised ({method}), which is not supported: use its 16-bit weights"
        )
    return config


class Checkpoint:
    """A folder of weight files.

    Attributes:
        digest: SHA-256 of config, headers and contents (contents sampled beyond 1 GiB, and named so).
        kind: "trained".
    """

    kind = "trained"

    def __init__(self, folder: Path) -> None:
        """Read and check the headers; no weights yet.

        Raises:
            CheckpointError: for missing, truncated or malformed files, naming the file.
        """
        self.folder = folder
        self._files = _weight_files(folder)
        self._entries: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]] = {}
        for path in self._files:
            self._entries.update(_read_header(path))
        self.digest = _digest(folder, self._files)

    def dtypes(self, model: LayeredModel) -> dict[str, torch.dtype]:
        """The kind of number in which each of the model's tensors is kept on disk."""
        if not any(dtype.is_floating_point for _, dtype, _ in self._entries.values()):
            raise CheckpointError(f"{self.folder} holds no weights: download it again")
        kinds = [dtype for _, dtype, shape in self._entries.values() if dtype.is_floating_point]
        usual = max(set(kinds), key=kinds.count)  # a fused source names only the first of its targets
        found = {name: usual for names in model.stage_tensors for name in names}
        for target, (_, parts) in self._targets(model)[0].items():
            found[model.canonical(target)] = self._entries[parts[0][0]][1]
        return found

    def ties_hold(self, model: LayeredModel) -> bool:
        """Whether tensors that the config ties are the same wherever the files hold both of them."""
        targets = self._targets(model)[0]
        with _Reader() as reader:
            for alias, canonical in model.aliases.items():
                if alias in targets and canonical in targets:
                    first, second = (
                        reader.lazy(self._entries[source][0], source)()
                        for source in (targets[alias][1][0][0], targets[canonical][1][0][0])
                    )
                    if not torch.equal(first, second):
                        return False
        return True

    def stream(self, model: LayeredModel) -> Iterator[tuple[str, Tensor]]:
        """Yield (canonical name, tensor) of every tensor the model needs, each once.

        Raises:
            CheckpointError: if a tensor is missing, left over, or has another shape than the model wants.
        """
        state = model.model.state_dict()
        targets, left_over = self._targets(model)
        wanted = {name for names in model.stage_tensors for name in names}
        if left_over:
            raise CheckpointError(
                f"checkpoint {self.folder} has {len(left_over)} tensors that {type(model.model).__name__} "
                f"does not know, first {sorted(left_over)[0]!r}: config.json does not belong to these weights"
            )
        with _Reader() as reader:
            for target, (mapping, parts) in targets.items():
                for source, pattern in parts:
                    path = self._entries[source][0]
                    mapping.add_tensor(target, source, pattern, reader.lazy(path, source))
                try:
                    realised = mapping.convert(target, model=model.model, config=model.model.config)
                except (SafetensorError, OSError, RuntimeError, ValueError) as error:
                    raise CheckpointError(
                        f"tensor {target!r} of {self.folder} cannot be read: {error}"
                    ) from error
                for name, value in realised.items():
                    tensor = value[0] if isinstance(value, list) else value
                    if name not in state:
                        continue
                    if tuple(tensor.shape) != tuple(state[name].shape):
                        raise CheckpointError(
                            f"tensor {name!r} of {self.folder} has shape {list(tensor.shape)}, "
                            f"config.json asks for {list(state[name].shape)}: they do not belong together"
                        )
                    canonical = model.canonical(name)
                    if canonical in wanted:
                        wanted.discard(canonical)
                        yield canonical, tensor
        if wanted:
            raise CheckpointError(
                f"checkpoint {self.folder} lacks {len(wanted)} tensors, first {sorted(wanted)[0]!r}: "
                "the files are incomplete or belong to another config.json"
            )

    def _targets(self, model: LayeredModel) -> tuple[dict[str, tuple[Any, list[tuple[str, str]]]], list[str]]:
        """Group the names on disk by the tensor in the model that they become.

        Returns target -> (transformers' converter, [(name on disk, pattern it matched)]), and the
        names that lead nowhere.
        """
        causal = model.model
        rules: list[Any] = get_model_conversion_mapping(causal)  # type: ignore[arg-type]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        state = causal.state_dict()
        prefix = causal.base_model_prefix
        targets: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        left_over = []
        for source in sorted(self._entries, key=dot_natural_key):
            name, pattern = rename_source_key(source, renamings, converters, prefix, state)
            if name not in state and source in state:
                name, pattern = rename_source_key(source, [], [], prefix, state)
            if name not in state:
                left_over.append(source)
                continue
            if pattern is None:
                targets.setdefault(name, (WeightRenaming(source, name), []))[1].append((source, source))
            else:
                targets.setdefault(name, (copy.deepcopy(by_pattern[pattern]), []))[1].append(
                    (source, pattern)
                )
        ignored = [
            re.compile(rule) for rule in getattr(causal, "_keys_to_ignore_on_load_unexpected", None) or ()
        ]
        harmless = re.compile(r"rotary_emb\.inv_freq|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")
        return targets, [
            name
            for name in left_over
            if not harmless.search(name) and not any(rule.search(name) for rule in ignored)
        ]


class RandomWeights:
    """Weights of the right shapes without a checkpoint: normal matrices, norms of one, biases of zero.

    Every tensor has its own stream seeded by its name, so the values depend on nothing else.
    """

    kind = "random"

    def __init__(self, config: PretrainedConfig, seed: int = 0) -> None:
        self.seed = seed
        self._dtype = getattr(config, "dtype", None) or torch.float16
        self._std = float(getattr(config, "initializer_range", None) or 0.02)
        text = json.dumps(config.to_dict(), sort_keys=True, default=str)
        self.digest = f"random-sha256:{hashlib.sha256(f'{seed}{text}'.encode()).hexdigest()}"

    def dtypes(self, model: LayeredModel) -> dict[str, torch.dtype]:
        """One kind of number for all tensors: the config's."""
        return {name: self._dtype for names in model.stage_tensors for name in names}

    def ties_hold(self, model: LayeredModel) -> bool:
        """Whether the config's ties hold: random weights follow them."""
        return True

    def stream(self, model: LayeredModel) -> Iterator[tuple[str, Tensor]]:
        """Yield (canonical name, tensor) of every tensor the model needs, each once."""
        state = model.model.state_dict()
        for name in dict.fromkeys(name for names in model.stage_tensors for name in names):
            shape = state[name].shape
            if len(shape) > 1:
                stream = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "little")
                generator = torch.Generator().manual_seed(stream >> 1)
                yield name, torch.empty(shape).normal_(0, self._std, generator=generator).to(self._dtype)
            else:
                yield name, (torch.ones if name.endswith("weight") else torch.zeros)(shape, dtype=self._dtype)


class _Reader:
    """Keeps at most one weight file open and reads single tensors from it."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._open: Any = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._path = self._open = None

    def lazy(self, path: Path, name: str) -> Callable[[], Tensor]:
        """A function that reads one tensor when it is called."""

        def read() -> Tensor:
            if self._path != path:
                self._open = (
                    safe_open(path, framework="pt")
                    if path.suffix == ".safetensors"
                    else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                )
                self._path = path
            tensor: Tensor = (
                self._open.get_tensor(name) if path.suffix == ".safetensors" else self._open[name]
            )
            return tensor

        return read


def _weight_files(folder: Path) -> list[Path]:
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            try:
                names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index} is not a weight index: {error}") from error
            for name in names:
                if Path(name).name != name:
                    raise CheckpointError(f"{index} names {name!r}, which is outside of its folder: refused")
                if not (folder / name).is_file():
                    raise CheckpointError(
                        f"{folder} lacks the shard {name!r} that {index.name} names: download it again"
                    )
            return [folder / name for name in names]
        single = folder / f"{stem}.{suffix}"
        if single.is_file():
            return [single]
    raise CheckpointError(
        f"{folder} holds no model.safetensors, pytorch_model.bin or their index: "
        "give a complete checkpoint, or ask for random weights"
    )


def _read_header(path: Path) -> dict[str, tuple[Path, torch.dtype, tuple[int, ...]]]:
    """Names, kinds and shapes in one weight file; every extent is checked against the file's length."""
    if path.suffix == ".bin":
        try:
            loaded = torch.load(path, map_location="meta", weights_only=True)
            return {name: (path, tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()}
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{path} cannot be read as plain weights: {first[:200]}") from error
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, 100 * MIB):
                raise ValueError(f"its header claims {length:,} bytes")
            header = json.loads(file.read(length))
        entries = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape = tuple(int(extent) for extent in entry["shape"])
            dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
            if dtype is None:
                raise CheckpointError(
                    f"tensor {name!r} in {path} is {entry['dtype']}, which is not supported: "
                    f"use {', '.join(_SAFETENSORS_DTYPES)}"
                )
            if end - begin != dtype.itemsize * torch.Size(shape).numel() or begin < 0:
                raise ValueError(f"tensor {name!r} claims {end - begin:,} bytes for shape {list(shape)}")
            if 8 + length + end > size:
                raise CheckpointError(
                    f"{path} is truncated: tensor {name!r} ends at byte {8 + length + end:,}, "
                    f"the file has {size:,} ({format_bytes(size)}): download it again"
                )
            entries[name] = (path, dtype, shape)
        return entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a valid safetensors file: {error}: download it again"
        ) from error


def _digest(folder: Path, files: list[Path]) -> str:
    """Identify config and weights; whole contents where they are small, 64 samples per file where not."""
    whole = sum(path.stat().st_size for path in files) <= _HASH_WHOLE_BELOW
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            if whole:
                while chunk := file.read(16 * MIB):
                    digest.update(chunk)
            else:
                for spot in range(64):
                    file.seek(spot * (size - 64 * 1024) // 63)
                    digest.update(file.read(64 * 1024))
    return f"{'sha256' if whole else 'sampled-sha256'}:{digest.hexdigest()}"
