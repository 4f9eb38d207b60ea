"""Attention in C of prompts that have no past, causally, in float32 or with bfloat16 products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.kernels.calls import AttentionOptions
from engine.kernels.cpu.calls import array, check, describe, library, plain, pointer, threads_of

_STRIDES = tuple(f"{part}_{what}" for part in ("query", "key", "value") for what in ("token", "head"))


class _PromptCall(ctypes.Structure):
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
    prompts: Sequence[tuple[int, int]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """Attend every prompt's tokens to those of its own up to themselves; its other tokens stay as they are.

    Args:
        prompts: place of the first token, and how many there are, of each.
        query: [H, P, D], key [G, P, D], value [G, P, E], of any float kind and strides.
        options: without a softcap or sinks. At `medium` products are of the nearest bfloat16, sums and
            softmax in float32, where the processor has a unit for that.
        out: float32 [P, H, E], contiguous.
        lse: float32 [P, H], filled with the logarithms of the sums of exp(score); None where nobody asks.
    """
    if options.softcap is not None or options.sinks is not None:
        raise ValueError("prompts are attended to without a softcap and without sinks")
    query, key, value = map(plain, (query, key, value))
    heads, tokens, width = query.shape
    groups, depth = key.shape[0], value.shape[2]
    if key.shape != (groups, tokens, width) or value.shape[:2] != (groups, tokens) or heads % groups:
        raise ValueError(
            f"queries {describe(query)}, keys {describe(key)} and values {describe(value)} differ"
        )
    for name, tensor, shape in (("output", out, (tokens, heads, depth)), ("lse", lse, (tokens, heads))):
        if tensor is not None and (
            tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous()
        ):
            raise ValueError(f"{name} {describe(tensor)} is not contiguous float32 {list(shape)}")
    places = np.array(prompts, dtype=np.int64).reshape(-1, 2)
    if len(places) and (places.min() < 0 or places.sum(1).max() > tokens):
        raise ValueError(f"prompts {list(prompts)} do not lie within {tokens} tokens")
    starts, lengths = np.ascontiguousarray(places[:, 0]), np.ascontiguousarray(places[:, 1])
    strides = (stride for part in (query, key, value) for stride in (part.stride(1), part.stride(0)))
    parts = options.precision.parts
    in_bfloats = parts == 1 and bool(library().takes_bfloats(parts))
    call = _PromptCall(
        heads=heads, groups=groups, key_width=width, value_width=depth, window=options.window or 0,
        scale=options.scale, prompts=len(places), starts=array(starts), lengths=array(lengths),
        query=query.data_ptr(), keys=key.data_ptr(), values=value.data_ptr(),
        **dict(zip(_STRIDES, strides, strict=True)),
        out=out.data_ptr(), lse=None if lse is None else lse.data_ptr(), in_bfloats=in_bfloats,
    )  # fmt: skip
    check(library().attend_prompts(pointer(call), threads_of(threads)))
