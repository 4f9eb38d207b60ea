"""The header of one weight file: which tensors it holds, of what kind and shape, and where.

A header comes from whoever made the file: every extent is checked against the others and the file's length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from engine.errors import CheckpointError, first_line
from engine.files.documents import DocumentError, parse_json, stands_for_another
from engine.models.formats.settings import GGUF_CURE
from engine.units import MIB, format_bytes

_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip

_MOST_HEADER = 100 * MIB

_KINDS = (
    (b"GGUF", f"a GGUF file: {GGUF_CURE}"),
    (b"PK\x03\x04", "an archive, as torch.save writes it: name it pytorch_model.bin"),
    (b"\x80\x02", "a pickle, as torch.save wrote it before 1.6: name it pytorch_model.bin"),
    (b"\x89HDF", "an HDF5 file, as TensorFlow writes it: use the model's safetensors files"),
)
"""First bytes of files that stand where a safetensors file was meant, and what they are."""


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
        return self.dtype.itemsize * math.prod(self.shape)


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Names, kinds and shapes in one weight file.

    Raises:
        CheckpointError: if the file is truncated, malformed, or holds a kind of number that torch lacks here.
    """
    try:
        return _read_pickled(path) if path.suffix == ".bin" else _read_safetensors(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a valid safetensors file: {error}: download it again"
        ) from error


def _read_safetensors(path: Path) -> dict[str, HeaderEntry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        kind = stands_for_another(head) or next(
            (what for magic, what in _KINDS if head.startswith(magic)), ""
        )
        if kind:
            raise CheckpointError(f"{path} is not a valid safetensors file: it is {kind}")
        length = int.from_bytes(head[:8], "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise ValueError(f"its header claims {length:,} bytes, the file has {size:,}")
        file.seek(8)
        text = file.read(length)
    try:
        header = parse_json(text)
    except DocumentError as error:
        raise ValueError(f"its header {error}") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    header.pop("__metadata__", None)
    extents = {name: _extent(name, entry) for name, entry in header.items()}
    last = max(extents, key=lambda name: extents[name][1], default="")
    if last and 8 + length + extents[last][1] > size:
        raise CheckpointError(
            f"{path} is truncated: tensor {last!r} ends at byte {8 + length + extents[last][1]:,}, "
            f"the file has {size:,} ({format_bytes(size)}): download it again"
        )
    entries, end = {}, 0
    for name, (begin, stop) in sorted(extents.items(), key=lambda item: item[1]):
        entry = header[name]
        dtype, shape = _kind_of(path, name, entry)
        if stop - begin != dtype.itemsize * math.prod(shape):
            raise ValueError(f"tensor {name!r} claims {stop - begin:,} bytes for shape {list(shape)}")
        if begin != end:
            where = "overlaps the one before it" if begin < end else "leaves a hole before it"
            raise ValueError(
                f"tensor {name!r} begins at byte {begin:,} of the data instead of {end:,} and {where}"
            )
        end = stop
        entries[name] = HeaderEntry(path, dtype, shape, 8 + length + begin)
    if 8 + length + end != size:
        raise ValueError(f"{size - 8 - length - end:,} bytes behind its last tensor belong to none")
    return {name: entries[name] for name in header}


def _extent(name: str, entry: Any) -> tuple[int, int]:
    """First byte of a tensor in the data, and the one behind its last."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} has no extent of two ascending offsets")
    return offsets[0], offsets[1]


def _kind_of(path: Path, name: str, entry: Mapping[str, Any]) -> tuple[torch.dtype, tuple[int, ...]]:
    shape, written = entry.get("shape"), entry.get("dtype")
    if not _are_counts(shape) or not isinstance(written, str):
        raise ValueError(f"tensor {name!r} has no shape, or no kind of number")
    dtype = _SAFETENSORS_DTYPES.get(written)
    if dtype is None:
        raise CheckpointError(
            f"tensor {name!r} in {path} is {written[:20]}, which is not supported: "
            f"use {', '.join(_SAFETENSORS_DTYPES)}"
        )
    return dtype, tuple(shape)


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    )


def _read_pickled(path: Path) -> dict[str, HeaderEntry]:
    """The same of what `torch.save` wrote; nothing but tensors is unpickled."""
    with path.open("rb") as file:
        kind = stands_for_another(file.read(64))
    if kind:
        raise CheckpointError(f"{path} holds no weights: it is {kind}")
    try:
        loaded = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # unpicklers raise many types
        raise CheckpointError(_why_no_weights(path, error)) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, no weights by name: {_PLAIN}")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.is_sparse:
            kind = "a sparse tensor" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise CheckpointError(f"{path} is not plain weights: {str(name)[:80]!r} is {kind}: {_PLAIN}")
    return {name: HeaderEntry(path, tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()}


_PLAIN = "use the model's safetensors files, or a .bin file of its state dict alone"


def _why_no_weights(path: Path, error: Exception) -> str:
    """Why torch's loader of plain weights refused a file, without its advice to load it in spite of that."""
    asked = re.search(r"(?:GLOBAL|class|global|function)[: ]+`?([A-Za-z_][\w.]*\.[\w.]+)", str(error))
    if asked:
        return (
            f"{path} is not plain weights: it asks for {asked[1][:80]}, which could run any code; nothing of "
            f"it was executed: {_PLAIN}"
        )
    return f"{path} cannot be read as plain weights ({first_line(error)}): download it again, or {_PLAIN}"
