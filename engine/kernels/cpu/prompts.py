"""Attention in C of prompts that have no past, causally, in float32 or with bfloat16 products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from engine.kernels.calls import AttentionCall
from engine.kernels.cpu.calls import array, check, describe, library, plain, pointer, threads_of

_STRIDES = tuple(f"{part}_{what}" for part in ("query", "key", "value") for what in ("token", "head"))


class _PromptArguments(ctypes.Structure):
    """`prompt_call` of csrc/prompts.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "groups", "key_width", "value_width", "window")),
        ("scale", ctypes.c_double),
        ("prompts", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("starts", "lengths", "query", "keys", "values")),
        *((name, ctypes.c_int64) for name in _STRIDES),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("in_bfloats", ctypes.c_int64),
    ]


def attend_prompts(
    call: AttentionCall, prompts: Sequence[tuple[int, int]], threads: int | None = None
) -> None:
    """Attend every prompt's tokens to its own up to themselves; tokens of no prompt are left as they are.

    Args:
        call: of any float kind and strides, without a softcap or sinks; ``out`` and ``lse`` are contiguous
            float32. At `medium` products are of the nearest bfloat16, sums and softmax in float32, where
            the processor has a unit for that.
        prompts: (place of the first token, number of tokens) of each.
    """
    options, shape, out, lse = call.options, call.shape, call.out, call.lse
    if options.softcap is not None or options.sinks is not None:
        raise ValueError("prompts are attended to without a softcap and without sinks")
    query, key, value = plain(call.query), plain(call.key), plain(call.value)
    tokens = len(query)
    if (
        query.shape != (tokens, shape.heads, shape.key_width)
        or key.shape != (tokens, shape.groups, shape.key_width)
        or value.shape != (tokens, shape.groups, shape.value_width)
        or shape.heads % shape.groups
    ):
        raise ValueError(
            f"queries {describe(query)}, keys {describe(key)} and values {describe(value)} differ"
        )
    for name, tensor, sizes in (
        ("output", out, (tokens, shape.heads, shape.value_width)), ("lse", lse, (tokens, shape.heads)),
    ):  # fmt: skip
        if tensor is not None and (
            tensor.dtype != torch.float32 or tensor.shape != sizes or not tensor.is_contiguous()
        ):
            raise ValueError(f"{name} {describe(tensor)} is not contiguous float32 {list(sizes)}")
    places = np.array(prompts, dtype=np.int64).reshape(-1, 2)
    if len(places) and (places.min() < 0 or places.sum(1).max() > tokens):
        raise ValueError(f"prompts {list(prompts)} do not lie within {tokens} tokens")
    starts, lengths = np.ascontiguousarray(places[:, 0]), np.ascontiguousarray(places[:, 1])
    strides = (stride for part in (query, key, value) for stride in part.stride()[:2])
    parts = options.precision.parts
    arguments = _PromptArguments(
        heads=shape.heads, groups=shape.groups, key_width=shape.key_width, value_width=shape.value_width,
        window=options.window or 0, scale=options.scale,
        prompts=len(places), starts=array(starts), lengths=array(lengths),
        query=query.data_ptr(), keys=key.data_ptr(), values=value.data_ptr(),
        **dict(zip(_STRIDES, strides, strict=True)),
        out=out.data_ptr(), lse=None if lse is None else lse.data_ptr(),
        in_bfloats=parts == 1 and bool(library().takes_bfloats(parts)),
    )  # fmt: skip
    check(library().attend_prompts(pointer(arguments), threads_of(threads)))
