"""Where trained weights come from: a `transformers` checkpoint, streamed tensor by tensor.

Nothing of a checkpoint is executed: safetensors files, or ``.bin`` files through torch's
``weights_only`` loading. Names on disk are mapped to names in the model by transformers' own
conversion rules, one target tensor at a time, so no more than one fused tensor and its parts are in
memory at once.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from engine.errors import CheckpointError, ModelError, first_line
from engine.kernels.calls import PackedMatrix
from engine.models.adapter import LayeredModel
from engine.models.decoder.left_out import grouped, misplaced
from engine.models.digests import KeptDigests, digest_of
from engine.models.formats.headers import HeaderEntry, read_header
from engine.models.formats.lora import Adapter
from engine.models.formats.settings import (
    GGUF_CURE,
    quantisation_of,
    read_settings,
    refuse_adapter_beside,
    refuse_other_kinds,
)
from engine.models.prequantised import QuantisedWeight, find_quantised, scheme_of
from engine.models.random_weights import RandomWeights as RandomWeights  # the other source of weights
from engine.models.weight_files import Reader, weight_files
from engine.spec.extent import Extent
from engine.spec.quant import QuantSpec

_HARMLESS = r"rotary_emb\.inv_freq|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$"
"""Names of tensors in files of old that models make themselves."""

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.bin"]


def resolve(model: str) -> Path:
    """The local folder of a model: itself, or a snapshot of the hub repository of that name.

    Raises:
        ModelError: if there is no such folder and the hub does not give it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix == ".gguf" and folder.exists():
        raise ModelError(f"model {model} is a GGUF file: {GGUF_CURE}")
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
    refuse_other_kinds(folder, model)
    given = quantisation_of(folder, read_settings(folder), has_packed=False)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        wants_code = "trust_remote_code" in str(error)
        hint = "; pass --trust-remote-code to run the code it carries" if wants_code else ""
        raise ModelError(f"config.json of {model} cannot be used: {first_line(error)}{hint}") from error
    if given is not None:
        scheme_of(given, model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the model is built as if its weights were exact
    return config


class Checkpoint:
    """A folder of weight files.

    Attributes:
        kind: "trained".
    """

    kind = "trained"

    def __init__(
        self,
        folder: Path,
        kept: KeptDigests | None = None,
        on_notice: Callable[[str], None] | None = None,
        adapter: Path | None = None,
    ) -> None:
        """Read and check the headers; no weights yet.

        Args:
            kept: digests of large files that need not be read again for `digest`.
            on_notice: called with a line when reading them takes long.
            adapter: folder of a PEFT adapter that is merged into the weights as they are read.

        Raises:
            CheckpointError: for missing, truncated or malformed files, naming the file.
        """
        self.folder = folder
        self._adapter = None if adapter is None else Adapter(adapter)
        if adapter is None:
            refuse_adapter_beside(folder)
        self._files, self._kept, self._on_notice = weight_files(folder), kept, on_notice
        self._entries: dict[str, HeaderEntry] = {}
        for path in self._files:
            self._entries.update(read_header(path))
        self._quantised = find_quantised(self._entries, folder)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of config, code of the model's own, weights, which are read whole for it, and the adapter.

        Raises:
            CheckpointError: if a file changes meanwhile.
            StorageError: if one cannot be read.
        """
        found = digest_of(self.folder, self._files, self._kept, self._on_notice)
        marks = [] if self._adapter is None else [self._adapter.digest]
        if any(weight.scheme.symmetric for weight in self._quantised.values()):
            marks.append("sym")  # what was packed before zero points were held against it does not count
        if not marks:
            return found
        kind, _, own = found.partition(":")
        return f"{kind}:{hashlib.sha256(' '.join([own, *marks]).encode()).hexdigest()}"

    def dtypes(self, model: LayeredModel) -> dict[str, torch.dtype]:
        """The kind of number in which each of the model's tensors is kept on disk."""
        kinds = [entry.dtype for entry in self._entries.values() if entry.dtype.is_floating_point]
        if not kinds:
            raise CheckpointError(f"{self.folder} holds no weights: download it again")
        state = model.model.state_dict()
        usual = max(set(kinds), key=kinds.count)  # a fused source names only the first of its targets
        found = {name: usual for names in model.stage_tensors for name in names}
        for target, (_, parts) in self._targets(model)[0].items():
            source = parts[0][0]
            weight = self._quantised.get(source)
            if target not in model.text_names:
                continue
            dtype = self._entries[weight.scales if weight else source].dtype
            if not weight and state[target].is_floating_point() and not dtype.is_floating_point:
                raise CheckpointError(
                    f"tensor {source!r} of {self.folder} holds {dtype} where the model has floating numbers: "
                    "its scales are missing, or of a format that config.json does not name"
                )
            found[model.canonical(target)] = dtype
        return found

    def packed_formats(self, model: LayeredModel) -> dict[str, QuantSpec]:
        """The formats of those tensors, by canonical name, that the files hold in few bits already.

        Raises:
            CheckpointError: if one of them is not as the config says, or groups are no runs of inputs.
        """
        formats = {}
        with Reader() as reader:
            for target, weight in self._quantised_targets(model).items():
                weight.check(*_matrix(model, target), partial(self._read, reader))
                formats[model.canonical(target)] = weight.scheme.spec
        return formats

    def ties_hold(self, model: LayeredModel) -> bool:
        """Whether tensors that the config ties are the same wherever the files hold both of them."""
        targets = self._targets(model)[0]
        with Reader() as reader:
            for alias, canonical in model.aliases.items():
                if alias in targets and canonical in targets:
                    sources = targets[alias][1][0][0], targets[canonical][1][0][0]
                    if any(source in self._quantised for source in sources):
                        return False  # rounded once and once more, or not at all
                    if not torch.equal(*(self._read(reader, source) for source in sources)):
                        return False
        return True

    def extents(self, model: LayeredModel) -> dict[str, Extent]:
        """Where those tensors, by canonical name, lie that a file holds byte by byte as the model wants them.

        Only tensors of safetensors files that are renamed at most: neither fused, nor split, nor in few bits.
        Kinds of numbers are those of `dtypes`. The headers have been checked against the files' lengths.
        """
        state = model.model.state_dict()
        changed = self._changed(model)
        found: dict[str, Extent] = {}
        for target, (mapping, parts) in self._targets(model)[0].items():
            if target in changed:
                continue
            entry = self._entries[parts[0][0]]
            plain = isinstance(mapping, WeightRenaming) and len(parts) == 1
            if not plain or parts[0][0] in self._quantised or entry.offset is None:
                continue
            if target not in model.text_names:
                continue
            if entry.shape == tuple(state[target].shape):
                extent = Extent(entry.path, entry.offset, entry.nbytes)
                found.setdefault(model.canonical(target), extent)
        return found

    def stream(
        self, model: LayeredModel, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor | PackedMatrix]]:
        """Yield (canonical name, tensor) of every tensor the model needs, or of those in ``only``, each once.

        What the files hold in few bits comes as a `PackedMatrix` of the format in `packed_formats`.

        Raises:
            CheckpointError: if a tensor is missing, left over, or has another shape than the model wants.
        """
        state = model.model.state_dict()
        targets, left_over = self._targets(model)
        quantised, changed = self._quantised_targets(model), self._changed(model)
        wanted = {name for names in model.stage_tensors for name in names}
        with Reader() as reader:
            self._refuse_misplaced(model, left_over, reader)
            for target, (mapping, parts) in targets.items():
                if target not in model.text_names:
                    continue
                canonical = model.canonical(target)
                if only is not None and canonical not in only and _makes_one(mapping):
                    wanted.discard(canonical)
                    continue
                try:
                    if target in quantised:
                        read = partial(self._read, reader)
                        realised = {target: quantised[target].repack(*_matrix(model, target), read)}
                    else:
                        for source, pattern in parts:
                            mapping.add_tensor(target, source, pattern, partial(self._read, reader, source))
                        realised = mapping.convert(target, model=model.model, config=model.model.config)
                except (OSError, RuntimeError, ValueError) as error:
                    raise CheckpointError(
                        f"tensor {target!r} of {self.folder} cannot be read: {first_line(error)}"
                    ) from error
                for name, value in realised.items():
                    tensor = value[0] if isinstance(value, list) else value
                    if name not in state:
                        continue
                    if isinstance(tensor, Tensor) and tensor.shape != state[name].shape:
                        raise CheckpointError(
                            f"tensor {name!r} of {self.folder} has shape {list(tensor.shape)}, "
                            f"config.json asks for {list(state[name].shape)}: they do not belong together"
                        )
                    canonical = model.canonical(name)
                    if canonical in wanted:
                        wanted.discard(canonical)
                        if only is None or canonical in only:
                            yield canonical, self._adapted(model, name, tensor) if name in changed else tensor
        if wanted:
            raise CheckpointError(
                f"checkpoint {self.folder} lacks {len(wanted)} tensors, first {sorted(wanted)[0]!r}: "
                "the files are incomplete or belong to another config.json"
            )

    def left_out(self, model: LayeredModel) -> Mapping[str, int]:
        """How many tensors of the files text does not need, by the first parts of their names."""
        targets, left_over = self._targets(model)
        towers = (parts for target, (_, parts) in targets.items() if target not in model.text_names)
        return grouped([*(source for parts in towers for source, _ in parts), *left_over])

    def _refuse_misplaced(self, model: LayeredModel, left_over: Mapping[str, str], reader: Reader) -> None:
        """Refuse tensors that lead nowhere and would change answers if they were left out."""
        ignored = getattr(model.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        sources = {
            name: source
            for source, name in left_over.items()
            if not any(re.search(rule, source) for rule in ignored) and not self._is_idle_bias(source, reader)
        }
        found = sorted(sources[name] for name in misplaced(model, sources))
        if found:
            raise CheckpointError(
                f"checkpoint {self.folder} has {len(found)} tensors that {type(model.model).__name__} does "
                f"not know, first {found[0]!r}: config.json does not belong to these weights"
            )

    def _changed(self, model: LayeredModel) -> frozenset[str]:
        """Names of the model's tensors that the adapter changes."""
        return frozenset() if self._adapter is None else self._adapter.targets(model)

    def _adapted(
        self, model: LayeredModel, name: str, tensor: Tensor | PackedMatrix
    ) -> Tensor | PackedMatrix:
        assert self._adapter is not None
        if isinstance(tensor, PackedMatrix):
            raise CheckpointError(
                f"adapter {self._adapter.folder} changes {name!r}, which {self.folder} holds in few bits "
                "already: give the base in 16 bits"
            )
        return self._adapter.merged(model, name, tensor)

    def _read(self, reader: Reader, name: str) -> Tensor:
        return reader.read(self._entries[name], name)

    def _is_idle_bias(self, name: str, reader: Reader) -> bool:
        """Whether a tensor is a bias of zeros, which GPTQ's writers add to layers that have none."""
        base, _, leaf = name.rpartition(".")
        return leaf == "bias" and f"{base}.qweight" in self._quantised and not self._read(reader, name).any()

    def _quantised_targets(self, model: LayeredModel) -> dict[str, QuantisedWeight]:
        """What is in few bits already, by the tensor in the model that it becomes."""
        sources = {target: parts[0][0] for target, (_, parts) in self._targets(model)[0].items()}
        return {
            target: self._quantised[source] for target, source in sources.items() if source in self._quantised
        }

    def _targets(
        self, model: LayeredModel
    ) -> tuple[dict[str, tuple[Any, list[tuple[str, str]]]], dict[str, str]]:
        """Group the names on disk by the tensor in the model that they become.

        Returns target -> (transformers' converter, [(name on disk, pattern it matched)]), and the
        names that lead nowhere, with what they would be called in the model.
        """
        causal = model.model
        rules: list[Any] = get_model_conversion_mapping(causal)  # type: ignore[arg-type]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        state = causal.state_dict()
        prefix = causal.base_model_prefix
        targets: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        left_over: dict[str, str] = {}
        parts_of_others = {part for weight in self._quantised.values() for part in weight.other_parts}
        for source in sorted(self._entries.keys() - parts_of_others, key=dot_natural_key):
            weight = self._quantised.get(source)
            exact = weight.name if weight else source
            name, pattern = rename_source_key(exact, renamings, converters, prefix, state)
            if name not in state and exact in state:
                name, pattern = rename_source_key(exact, [], [], prefix, state)
            if name not in state:
                left_over[source] = name
                continue
            if weight and pattern is not None:
                raise CheckpointError(
                    f"tensor {source!r} of {self.folder} is quantised ({weight.scheme.method}) and belongs "
                    f"into {name!r} with others, which is not supported: use the model's 16-bit weights"
                )
            rule = WeightRenaming(source, name) if pattern is None else copy.deepcopy(by_pattern[pattern])
            targets.setdefault(name, (rule, []))[1].append((source, pattern or source))
        return targets, {
            source: name for source, name in left_over.items() if not re.search(_HARMLESS, source)
        }


def _makes_one(mapping: Any) -> bool:
    """Whether a converter of transformers yields one tensor only, which bears the target's name."""
    return isinstance(mapping, WeightRenaming) or len(mapping.target_patterns) == 1


def _matrix(model: LayeredModel, target: str) -> tuple[int, int]:
    """Outputs and inputs of a weight in the model."""
    owner, _, leaf = target.rpartition(".")
    module = model.model.get_submodule(owner)
    shape = getattr(module, leaf).shape
    if len(shape) != 2:
        raise CheckpointError(
            f"tensor {target!r} is quantised but no matrix: config.json does not belong to these weights"
        )
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])
