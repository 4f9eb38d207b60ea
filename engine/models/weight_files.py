"""The weight files of a folder: which there are, what their headers say, how single tensors are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.models.digests import DROP_BEYOND
from engine.units import MIB, format_bytes

_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class HeaderEntry(NamedTuple):
    """Where one tensor is, and what it is."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    offset: int | None = None
    """Bytes from the beginning of a safetensors file; None in other files."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


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
                self._loaded = torch.load(entry.path, map_location="cpu", weights_only=True, mmap=True)
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

    Raises:
        CheckpointError: if there are none, or an index is malformed or leads elsewhere.
    """
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


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Names, kinds and shapes in one weight file; every extent is checked against the file's length.

    Raises:
        CheckpointError: if the file is truncated, malformed, or holds a kind of number that torch lacks here.
    """
    if path.suffix == ".bin":
        try:
            loaded = torch.load(path, map_location="meta", weights_only=True)
            return {
                name: HeaderEntry(path, tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()
            }
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
            entries[name] = HeaderEntry(path, dtype, shape, 8 + length + begin)
        return entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a valid safetensors file: {error}: download it again"
        ) from error
