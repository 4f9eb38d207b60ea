"""Small entries of the packed store with known content."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.memory.store.index import PIECE, About, StoredTensor, key_of
from engine.memory.store.packed import PackedStore, StoreEntry
from engine.memory.store.writer import Writer

ABOUT = About("org/model", "OPTForCausalLM", "sha256:1", "trained", "4")

SIZES = {"embed": 5000, "layers.0.w": 2 * PIECE + 123, "layers.0.b": 7, "empty": 0, "head": PIECE}
"""Bytes of each tensor: more than one aligned block of 4096, two pieces and a rest, a few bytes, nothing, and
exactly one piece."""

TENSORS = tuple(StoredTensor(name, size, "4", (size, 2), "float16") for name, size in SIZES.items())

KEY = key_of("sha256:1", TENSORS)


def content(name: str) -> Tensor:
    """A tensor's content, [SIZES[name]] uint8: random, with a seed from its name."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randint(0, 256, (SIZES[name],), dtype=torch.uint8, generator=generator)


def write(writer: Writer) -> None:
    """Write all tensors, the last one first."""
    for name in reversed(SIZES):
        writer.put(name, content(name))


def make(root: Path) -> StoreEntry:
    """The entry, made if needed, and in use."""
    return PackedStore(root).obtain(KEY, ABOUT, TENSORS, write)


def read(entry: StoreEntry, name: str) -> Tensor:
    """The bytes at the place in the entry's file where its index says the tensor is, [n] uint8."""
    extent = entry.extent(name)
    data = bytearray(extent.path.read_bytes()[extent.offset : extent.end])
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
