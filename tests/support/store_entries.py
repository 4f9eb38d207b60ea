"""Small entries of the packed store, and what is in them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.memory.store.index import PIECE, About, StoredTensor, key_of
from engine.memory.store.packed import PackedStore, StoreEntry
from engine.memory.store.writer import Writer

ABOUT = About("org/model", "OPTForCausalLM", "sha256:1", "trained", "4")

SIZES = {"embed": 5000, "layers.0.w": 2 * PIECE + 123, "layers.0.b": 7, "empty": 0, "head": PIECE}
"""Bytes of each tensor: less than an aligned block, several pieces and a rest, a whole piece, nothing."""

TENSORS = tuple(StoredTensor(name, size, "4", (size, 2), "float16") for name, size in SIZES.items())

KEY = key_of("sha256:1", TENSORS)


def content(name: str) -> Tensor:
    """The bytes of a tensor, which depend on its name."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randint(0, 256, (SIZES[name],), dtype=torch.uint8, generator=generator)


def write(writer: Writer) -> None:
    """Everything, the last tensor first."""
    for name in reversed(SIZES):
        writer.put(name, content(name))


def make(root: Path) -> StoreEntry:
    """The entry, in use."""
    return PackedStore(root).obtain(KEY, ABOUT, TENSORS, write)


def read(entry: StoreEntry, name: str) -> Tensor:
    """What the entry's file has where it says the tensor is."""
    extent = entry.extent(name)
    data = bytearray(extent.path.read_bytes()[extent.offset : extent.end])
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file, and not its times."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
