"""The weight files of a folder: which there are, and how single tensors are read from them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.files.documents import MOST_BYTES, DocumentError, read_json
from engine.models.digests import DROP_BEYOND
from engine.models.formats.headers import HeaderEntry
from engine.models.formats.settings import GGUF_CURE


class Reader:
    """Keeps at most one weight file open and reads single tensors from it.

    Safetensors are read, not mapped, and what was read from a large file is dropped from the page cache: a
    checkpoint passes through, it does not push out what others have cached.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor = -1
        self._drops = False
        self._loaded: dict[str, Tensor] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def read(self, entry: HeaderEntry, name: str) -> Tensor:
        """One tensor, in memory of its own where the file is a safetensors file.

        Raises:
            OSError: if the file cannot be read or has become shorter.
        """
        if self._path != entry.path:
            self._close()
            if entry.offset is None:
                mapped = zipfile.is_zipfile(entry.path)  # what torch.save wrote before 1.6 cannot be mapped
                self._loaded = torch.load(entry.path, map_location="cpu", weights_only=True, mmap=mapped)
            else:
                self._descriptor = os.open(entry.path, os.O_RDONLY)
                self._drops = os.fstat(self._descriptor).st_size > DROP_BEYOND
            self._path = entry.path
        if entry.offset is None:
            return self._loaded[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        view, done = tensor.view(-1).view(torch.uint8).numpy().data, 0
        while done < entry.nbytes:
            count = os.preadv(self._descriptor, [view[done:]], entry.offset + done)
            if not count:
                raise OSError(f"{entry.path} ends at byte {entry.offset + done:,}: it was changed meanwhile")
            done += count
        if self._drops:
            os.posix_fadvise(self._descriptor, entry.offset, entry.nbytes, os.POSIX_FADV_DONTNEED)
        return tensor

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._path, self._descriptor, self._loaded = None, -1, {}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or the shards that an index names.

    As transformers has it, a single file comes before an index, and safetensors before pickles. Where none
    of these names is there, one safetensors file of another will do (AutoGPTQ's ``gptq_model-4bit-128g``).

    Raises:
        CheckpointError: if there are none, or an index is malformed or leads elsewhere.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards(folder, index)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return _shards(folder, indices[0])
    others = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(_NO_MODELS)]
    if len(others) == 1 and not indices:
        return others
    if others:
        names = ", ".join(path.name for path in others[:3])
        raise CheckpointError(
            f"{folder} holds {len(others)} safetensors files ({names}{', ...' * (len(others) > 3)}) and no "
            "model.safetensors or its index: rename the one that is meant to model.safetensors"
        )
    if gguf := sorted(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder} holds weights as GGUF alone ({gguf[0].name}): {GGUF_CURE}")
    raise CheckpointError(
        f"{folder} holds no model.safetensors, pytorch_model.bin or their index: "
        "give a complete checkpoint, or ask for random weights"
    )


_NO_MODELS = ("adapter_model", "consolidated")
"""How files begin that are no model of transformers' names."""


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        content = read_json(index, most=MOST_BYTES // 4)
    except (DocumentError, OSError) as error:
        raise CheckpointError(f"{index} is not a weight index: it {error}: download it again") from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(
            f"{index} is not a weight index: it has no weight_map of names: download it again"
        )
    found = sorted(set(names.values()))
    for name in found:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name[:80]!r}, which is outside of its folder: refused")
        if not os.path.isfile(folder / name):
            raise CheckpointError(
                f"{folder} lacks the shard {name[:80]!r} that {index.name} names: download it again"
            )
    return [folder / name for name in found]
