"""Attention in C of prompts that have no past, causally, in float32 or with bfloat16 products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from engine.kernels.calls import AttentionCall
from engine.kernels.cpu.calls import (
    check,
    check_results,
    describe,
    fields,
    library,
    plain,
    pointer,
    threads_of,
)

_STRIDES = "query_token query_head key_token key_head value_token value_head"


class _PromptArguments(ctypes.Structure):
    """`prompt_call` of csrc/prompts.c."""

    _fields_ = [
        *fields(ctypes.c_int64, "heads groups key_width value_width window"),
        ("scale", ctypes.c_double),
        ("prompts", ctypes.c_int64),
        *fields(ctypes.c_void_p, "starts lengths query keys values"),
        *fields(ctypes.c_int64, _STRIDES),
        *fields(ctypes.c_void_p, "out lse"),
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
    check_results(out, lse, tokens, shape)
    places = np.array(prompts, dtype=np.int64).reshape(-1, 2).T.copy()
    if places.size and (places.min() < 0 or places.sum(0).max() > tokens):
        raise ValueError(f"prompts {list(prompts)} do not lie within {tokens} tokens")
    starts, lengths = places
    strides = (stride for part in (query, key, value) for stride in part.stride()[:2])
    parts = options.precision.parts
    arguments = _PromptArguments(
        heads=shape.heads, groups=shape.groups, key_width=shape.key_width, value_width=shape.value_width,
        window=options.window or 0, scale=options.scale,
        prompts=len(starts), starts=starts.ctypes.data, lengths=lengths.ctypes.data,
        query=query.data_ptr(), keys=key.data_ptr(), values=value.data_ptr(),
        **dict(zip(_STRIDES.split(), strides, strict=True)),
        out=out.data_ptr(), lse=None if lse is None else lse.data_ptr(),
        in_bfloats=parts == 1 and bool(library().takes_bfloats(parts)),
    )  # fmt: skip
    check(library().attend_prompts(pointer(arguments), threads_of(threads)))
