"""How tensors are handed to C: addresses, formats, and what must hold before memory is touched."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from engine.kernels.cpu import build
from engine.spec.float_format import FloatSpec, MatrixForm
from engine.spec.quant import Along, Fit, Offset

_OFFSETS = {Offset.MINIMUM: 0, Offset.ZERO: 1, Offset.MIDDLE: 2}
KINDS = {"float16": 1, "bfloat16": 2, "float32": 3}  # 0: codes


class Format(ctypes.Structure):
    """`format` of csrc/formats.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "bits",
            "group",
            "offset",
            "along",
            "fit",
            "width",
            "groups",
            "code_bytes",
            "block_rows",
            "kind",
        )
    ]


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
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check(status: int) -> None:
    if status == 1:
        raise ValueError("a value is not finite or beyond the range of its 16-bit numbers")
    if status:
        raise MemoryError("no memory for the buffers of the compiled kernels")


def threads_of(threads: int | None) -> int:
    return threads or torch.get_num_threads()


pointer, integer = ctypes.byref, ctypes.c_int64


def array(values: np.ndarray) -> ctypes.c_void_p:
    """The address of an int64 array, which the caller has to keep alive."""
    if values.dtype != np.int64 or not values.flags.c_contiguous:
        raise ValueError(f"{values.dtype} {list(values.shape)} is not consecutive int64")
    return ctypes.c_void_p(values.ctypes.data)


def address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
