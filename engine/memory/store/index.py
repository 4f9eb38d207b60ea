"""What an entry of the packed store says of itself: which tensors it holds, where, and how they are checked.

Knows the content of ``index.json`` and how keys are made; reads and writes no weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from engine.spec.layout import ALIGNMENT, aligned
from engine.units import MIB

FORMAT = 1
"""Version of the layout; part of every key, so that another version never meets an entry of this one."""

PIECE = 4 * MIB
"""Bytes that have a checksum of their own, and that are read and written at once."""

KEY_DIGITS = 32


@dataclass(frozen=True)
class About:
    """Where an entry comes from; shown to people, not interpreted."""

    model: str
    """Folder or hub name as the user gave it."""

    architecture: str
    digest: str
    """Of config and weights."""

    weights: str
    """``trained`` or ``random``."""

    formats: str
    """How weights are kept, as a policy writes it."""

    calibration: str = ""
    """Digest of the statistics by which outliers were moved; empty without."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an entry."""

    name: str
    nbytes: int
    form: str
    """How it is packed, as `engine.spec.quant.QuantSpec` writes it; ``16`` if it is not."""

    shape: tuple[int, ...]
    """Of the numbers, not of the bytes."""

    dtype: str
    """Kind of number, of packed ones before they were packed."""


@dataclass(frozen=True)
class Placed:
    """A tensor and where its bytes are."""

    tensor: StoredTensor
    offset: int
    checksums: tuple[int, ...] = ()
    """CRC-32 of each `PIECE`."""


@dataclass(frozen=True)
class Index:
    """All that ``index.json`` says."""

    about: About
    created: float
    """Seconds since 1970."""

    nbytes: int
    """Length of the weights' file."""

    tensors: Mapping[str, Placed]

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
            ValueError: if it is not so, in one line.
        """
        try:
            content = json.loads(text)
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
        """Whether the entry has exactly these tensors in this order."""
        return [placed.tensor for placed in self.tensors.values()] == list(tensors)


def key_of(source_digest: str, tensors: Sequence[StoredTensor], calibration: str = "") -> str:
    """The name of the entry of such a content in such bits, wherever its weights are going to live.

    Args:
        source_digest: of the checkpoint's config and weights, or of random weights' config and seed.
        tensors: all that the entry is to hold, in the order of the stages.
        calibration: digest of the statistics by which outliers were moved before packing.
    """
    rows = [[getattr(tensor, field.name) for field in fields(tensor)] for tensor in tensors]
    return _sha256(json.dumps([FORMAT, source_digest, calibration, rows]))[:KEY_DIGITS]


def place(tensors: Sequence[StoredTensor]) -> tuple[dict[str, Placed], int]:
    """One tensor after the other, each at a multiple of `ALIGNMENT`; also the length of them all."""
    placed: dict[str, Placed] = {}
    end = 0
    for tensor in tensors:
        if tensor.name in placed:
            raise ValueError(f"tensor {tensor.name!r} is named twice")
        placed[tensor.name] = Placed(tensor, end)
        end = aligned(end + tensor.nbytes)
    return placed, end


def pieces(nbytes: int) -> int:
    """Checksums of a tensor of so many bytes."""
    return -(-nbytes // PIECE)


def _placed(row: dict[str, Any]) -> Placed:
    known = {field.name: row[field.name] for field in fields(StoredTensor)}
    return Placed(
        StoredTensor(**{**known, "shape": tuple(row["shape"])}), row["offset"], tuple(row["checksums"])
    )


def _check(placed: Placed, length: int) -> None:
    tensor, offset = placed.tensor, placed.offset
    if offset < 0 or offset % ALIGNMENT or tensor.nbytes < 0 or offset + tensor.nbytes > length:
        raise ValueError(f"tensor {tensor.name!r} is said to be at byte {offset:,} of {length:,}")
    if len(placed.checksums) != pieces(tensor.nbytes):
        raise ValueError(f"tensor {tensor.name!r} has {len(placed.checksums)} checksums")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
