"""How tensors are handed to C: addresses, formats, and what must hold before memory is touched."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from engine.kernels.calls import HeadShape
from engine.kernels.cpu import build
from engine.spec.float_format import FloatSpec, MatrixForm
from engine.spec.quant import Along, Fit, Offset

_OFFSETS = {Offset.MINIMUM: 0, Offset.ZERO: 1, Offset.MIDDLE: 2}
KINDS = {"float16": 1, "bfloat16": 2, "float32": 3}  # 0: codes
pointer = ctypes.byref


def fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Consecutive fields of one kind in a structure, by their names with spaces between."""
    return [(name, kind) for name in names.split()]


class Format(ctypes.Structure):
    """`format` of csrc/formats.h."""

    _fields_ = fields(ctypes.c_int64, "bits group offset along fit width groups code_bytes block_rows kind")


@lru_cache(maxsize=256)
def format_of(spec: MatrixForm, width: int) -> Format:
    if isinstance(spec, FloatSpec):
        return Format(
            bits=spec.bits, width=width, code_bytes=spec.block_bytes(width), block_rows=1,
            kind=KINDS[spec.dtype],
        )  # fmt: skip
    return Format(
        bits=spec.bits,
        group=spec.group(width),
        offset=_OFFSETS[spec.offset],
        along=int(spec.along is Along.COLUMN),
        fit=int(spec.fit is Fit.ERROR),
        width=width,
        groups=spec.groups(width),
        code_bytes=spec.code_bytes(width),
        block_rows=spec.block_rows,
    )


def library() -> ctypes.CDLL:
    library = build.library()
    if library is None:
        raise RuntimeError(f"the compiled kernels are not available: {build.reason()}")
    return library


def plain(rows: Tensor) -> Tensor:
    """[..., width] as float32 with consecutive values in a row; the tensor itself if it is so."""
    if rows.dtype != torch.float32:
        rows = rows.float()
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def describe(tensor: Tensor) -> str:
    """Kind and sizes of a tensor [...] for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check(status: int) -> None:
    if status == 1:
        raise ValueError("a value is not finite or beyond the range of its 16-bit numbers")
    if status:
        raise MemoryError("no memory for the buffers of the compiled kernels")


def threads_of(threads: int | None) -> int:
    return threads or torch.get_num_threads()


def check_results(out: Tensor, lse: Tensor | None, tokens: int, shape: HeadShape) -> None:
    """Refuse what attention cannot write to: ``out`` is [tokens, H, E], ``lse`` [tokens, H]."""
    for name, result, sizes in (
        ("output", out, (tokens, shape.heads, shape.value_width)), ("lse", lse, (tokens, shape.heads)),
    ):  # fmt: skip
        if result is not None and (
            result.dtype != torch.float32 or result.shape != sizes or not result.is_contiguous()
        ):
            raise ValueError(f"{name} {describe(result)} is not contiguous float32 {list(sizes)}")
