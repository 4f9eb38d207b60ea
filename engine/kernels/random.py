"""Numbers that are nearly normal, each a function of a stream and its own index.

Any part of a tensor can be made alone, in any order, by any number of threads: what is too large for
memory is made in pieces. `csrc/random.c` does it fast, `reference` says in torch what it does; both give
the same bits. It knows no model, and is meant for weights that nobody trained, not for statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels.cpu import build

VERSION = 1
"""Changes when the values of a stream do."""

STANDARD_DEVIATION = 65536 / 3**0.5
"""Of the integers before they are scaled: the sum of four uniform numbers of 16 bits."""

_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PIECE = 1 << 18  # values that the reference, or a conversion, holds at once
_MASK = 0xFFFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def fill(
    stream: int, start: int, out: Tensor, standard_deviation: float = 1.0, threads: int | None = None
) -> Tensor:
    """Write values ``start`` to ``start + out.numel()`` of a stream; their mean is 0.

    Args:
        stream: 64 bits without a sign; different streams share nothing.
        out: [...] contiguous, on the CPU, of any float kind; those that C does not know come from float32.
        threads: torch's own number if None.

    Raises:
        ValueError: if ``out`` is not contiguous or not on the CPU.
    """
    if out.device.type != "cpu" or not out.is_contiguous():
        raise ValueError("random values are made in contiguous memory of the CPU")
    library = build.library()
    if library is None:
        return reference(stream, start, out, standard_deviation)
    if out.dtype not in _KINDS:
        buffer = torch.empty(min(_PIECE, out.numel()))
        for part, at in _pieces(out, start):
            part.copy_(fill(stream, at, buffer[: part.numel()], standard_deviation, threads))
        return out
    library.fill_random(
        stream, start, out.numel(), standard_deviation / STANDARD_DEVIATION, _KINDS[out.dtype],
        out.data_ptr(), threads or torch.get_num_threads(),
    )  # fmt: skip
    return out


def reference(stream: int, start: int, out: Tensor, standard_deviation: float = 1.0) -> Tensor:
    """What `fill` does to ``out`` [...], in torch."""
    scale = torch.tensor(standard_deviation / STANDARD_DEVIATION, dtype=torch.float32)
    for part, at in _pieces(out, start):
        index = torch.arange(at, at + part.numel(), dtype=torch.int64)
        for block in range(at >> 32, (at + part.numel() - 1 >> 32) + 1):
            inside = index >> 32 == block
            part[inside] = (_integers(_block_key(stream, block), index[inside] & _MASK) * scale).to(out.dtype)
    return out


def _pieces(out: Tensor, start: int) -> list[tuple[Tensor, int]]:
    """Parts of ``out`` that are few values each, with the index of their first one."""
    flat = out.view(-1)
    return [(flat[at : at + _PIECE], start + at) for at in range(0, out.numel(), _PIECE)]


def _block_key(stream: int, block: int) -> int:
    """What 2**32 consecutive values of a stream share."""
    z = (stream + (block + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK64
    return z ^ (z >> 31)


def _integers(key: int, counter: Tensor) -> Tensor:
    """int64 counters below 2**32 -> float32 integers, as ``nearly_normal`` of csrc/random.c."""
    x = (counter + (key & _MASK)) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = x ^ (key >> 32)
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    x = x ^ (x >> 16)
    y = (x * 0x9E3779B1) & _MASK
    y = y ^ (y >> 15)
    fields = (x & 0xFFFF) + (x >> 16) + (y & 0xFFFF) + (y >> 16)
    return (fields - 131070).to(torch.float32)
