"""The index of an entry of the packed store: its tensors, their offsets and checksums, and its key.

Knows the content of ``index.json`` and how keys are made; reads and writes no weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from engine.files.documents import parse_json
from engine.spec.layout import ALIGNMENT, STORE_PIECE, aligned

FORMAT = 1
"""Version of the layout; part of every key, so that no other version ever reads an entry of this one."""

PIECE = STORE_PIECE
"""Bytes that have one checksum, and are read or written by one request."""

KEY_DIGITS = 32


@dataclass(frozen=True)
class About:
    """Where an entry comes from; shown to users, not interpreted."""

    model: str
    """Folder or hub name as the user gave it."""

    architecture: str
    digest: str
    """Of config and weights."""

    weights: str
    """``trained`` or ``random``."""

    formats: str
    """Format of the weights, as a policy writes it."""

    calibration: str = ""
    """Digest of the statistics by which outliers were moved; empty if none were."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an entry."""

    name: str
    nbytes: int
    form: str
    """How it is packed, as `engine.spec.quant.QuantSpec` writes it; ``16`` if it is not."""

    shape: tuple[int, ...]
    """Of the numbers before packing."""

    dtype: str
    """Of the numbers before packing."""


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor and the offset of its bytes in the weights' file."""

    tensor: StoredTensor
    offset: int
    checksums: tuple[int, ...] = ()
    """CRC-32 of each `PIECE`."""


@dataclass(frozen=True)
class Index:
    """The content of ``index.json``."""

    about: About
    created: float
    """Seconds since 1970."""

    nbytes: int
    """Length of the weights' file."""

    tensors: Mapping[str, PlacedTensor]

    def to_json(self) -> str:
        """The content of ``index.json``, with a checksum of its own."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "about": asdict(self.about),
            "created": self.created,
            "nbytes": self.nbytes,
            "piece": PIECE,
            "tensors": [
                {**asdict(placed.tensor), "offset": placed.offset, "checksums": list(placed.checksums)}
                for placed in self.tensors.values()
            ],
        }
        return json.dumps(content | {"sha256": _sha256(json.dumps(content, sort_keys=True))})

    @classmethod
    def from_json(cls, text: str) -> Index:
        """Read what `to_json` writes.

        Raises:
            ValueError: if it is anything else, in one line.
        """
        try:
            content = parse_json(text)
            checksum = content.pop("sha256")
            if _sha256(json.dumps(content, sort_keys=True)) != checksum:
                raise ValueError("its checksum is wrong")
            if (content["format"], content["piece"]) != (FORMAT, PIECE):
                raise ValueError(f"it has format {content['format']}, this program reads {FORMAT}")
            tensors = {row["name"]: _placed(row) for row in content["tensors"]}
            index = cls(About(**content["about"]), float(content["created"]), content["nbytes"], tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it lacks or misspells {error}") from error
        for placed in tensors.values():
            _check(placed, index.nbytes)
        return index

    def holds(self, tensors: Sequence[StoredTensor]) -> bool:
        """Whether the entry has exactly these tensors, in this order."""
        return [placed.tensor for placed in self.tensors.values()] == list(tensors)


def key_of(source_digest: str, tensors: Sequence[StoredTensor], calibration: str = "") -> str:
    """The name of an entry by its content and formats; placement makes no difference.

    Args:
        source_digest: of the checkpoint's config and weights, or of random weights' config and seed.
        tensors: all tensors of the entry, in the order of the stages.
        calibration: digest of the statistics by which outliers were moved before packing.
    """
    rows = list(map(astuple, tensors))
    return _sha256(json.dumps([FORMAT, source_digest, calibration, rows]))[:KEY_DIGITS]


def place(tensors: Sequence[StoredTensor]) -> tuple[dict[str, PlacedTensor], int]:
    """Place tensors one after another, each at a multiple of `ALIGNMENT`; also returns the total length."""
    placed: dict[str, PlacedTensor] = {}
    end = 0
    for tensor in tensors:
        if tensor.name in placed:
            raise ValueError(f"tensor {tensor.name!r} is named twice")
        placed[tensor.name] = PlacedTensor(tensor, end)
        end = aligned(end + tensor.nbytes)
    return placed, end


def _placed(row: dict[str, Any]) -> PlacedTensor:
    shape = tuple(row["shape"])
    tensor = StoredTensor(row["name"], row["nbytes"], row["form"], shape, row["dtype"])
    return PlacedTensor(tensor, row["offset"], tuple(row["checksums"]))


def _check(placed: PlacedTensor, length: int) -> None:
    tensor, offset = placed.tensor, placed.offset
    if offset < 0 or offset % ALIGNMENT or tensor.nbytes < 0 or offset + tensor.nbytes > length:
        raise ValueError(f"tensor {tensor.name!r} is said to be at byte {offset:,} of {length:,}")
    if len(placed.checksums) != -(-tensor.nbytes // PIECE):
        raise ValueError(f"tensor {tensor.name!r} has {len(placed.checksums)} checksums")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
