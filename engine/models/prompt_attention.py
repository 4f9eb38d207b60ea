"""Attention of whole prompts, many in one call: of any lengths in C or by torch on CUDA, else of one length.

Nothing of tokens x tokens is written out here: what would need that (soft-capping, sinks, windows shorter
than a prompt without the variable-length kernel) is left to the caller.

Axes: H query heads, G key-value heads, D head width, E value head width, P packed tokens, T of one prompt.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.backend import Kernels
from engine.kernels.calls import AttentionCall

Varlen = Callable[..., Any]
"""`torch.nn.attention.varlen.varlen_attn`."""

Prompt = tuple[int, int]
"""Place of its first token among the packed ones, and T."""

_FUSED_WITH_LSE: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""What `F.scaled_dot_product_attention` calls on a CPU; it drops the lse."""

_VARLEN_ARGUMENTS = {"scale", "window_size", "enable_gqa"}
_WIDEST_HEAD = 256


@cache
def varlen_for(device: torch.device, dtype: torch.dtype) -> Varlen | None:
    """Torch's fused attention over sequences of any lengths, where it runs: half precision, from sm80 on."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if known.keys() >= _VARLEN_ARGUMENTS else None


def attend_prompts(call: AttentionCall, prompts: Sequence[Prompt], kernels: Kernels) -> list[Prompt]:
    """Attend prompts that have no past, causally; returns those that are left to do one by one."""
    query, key, value, out, lse, options = call.query, call.key, call.value, call.out, call.lse, call.options
    if options.softcap is not None or options.sinks is not None or not prompts:
        return list(prompts)
    if kernels.attend_prompts is not None and query.dtype == torch.float32:
        kernels.attend_prompts(call, prompts)
        return []
    if lse is not None and (_FUSED_WITH_LSE is None or query.is_cuda):
        return list(prompts)
    varlen = varlen_for(query.device, query.dtype)
    heads, groups, width = call.shape.heads, call.shape.groups, call.shape.key_width
    if varlen is not None and width == value.shape[-1] and width <= _WIDEST_HEAD and width % 8 == 0:
        _attend_varlen(varlen, call, prompts)
        return []
    if query.is_cuda and query.dtype == torch.float32 and heads != groups:
        return list(prompts)  # no fused kernel: scores would be written out
    left = []
    for (start, length), run in _equal_runs(prompts):
        if options.window and options.window < length:
            left += [(start + index * length, length) for index in range(run)]
            continue
        rows = slice(start, start + run * length)
        # [run, heads, T, width] each
        parts = [part[rows].unflatten(0, (run, length)).transpose(1, 2) for part in (query, key, value)]
        if lse is None:
            result = fused(parts[0], parts[1], parts[2], options.scale, is_causal=True)  # [run, H, T, E]
        else:
            result, total = _fused_with_lse(parts[0], parts[1], parts[2], options.scale)
            lse[rows].view(run, length, heads).copy_(total.transpose(1, 2))
        out[rows].view(run, length, heads, -1).copy_(result.transpose(1, 2))
    return left


def _fused_with_lse(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `fused`, causally, with the log-sum-exp of the scores, float32 [S, H, t]."""
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    result, lse = _FUSED_WITH_LSE(query, key, value, 0.0, True, scale=scale)
    return result[..., :width], lse


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Torch's fused attention [S, H, t, E]; narrower values are widened, as it wants one width.

    Args:
        query: [S, H, t, D]; key [S, G, k, D]; value [S, G, k, E].
        mask: [t, k], True where a query sees a key.
    """
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    result = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return result[..., :width]


def _equal_runs(prompts: Sequence[Prompt]) -> list[tuple[Prompt, int]]:
    """Neighbours of one length: the first of each run, and their number."""
    runs: list[tuple[Prompt, int]] = []
    for start, length in prompts:
        if runs:
            first, count = runs[-1]
            if first[1] == length and first[0] + count * length == start:
                runs[-1] = (first, count + 1)
                continue
        runs.append(((start, length), 1))
    return runs


def _attend_varlen(varlen: Varlen, call: AttentionCall, prompts: Sequence[Prompt]) -> None:
    """All prompts in one call; its window does not count the query's own position."""
    options, lengths = call.options, [length for _, length in prompts]
    device = call.query.device
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    parts = [call.query, call.key, call.value]  # [P, heads, width]
    places = None
    if sum(lengths) < len(call.query):
        spans = [torch.arange(start, start + length) for start, length in prompts]
        places = torch.cat(spans).to(device)
        parts = [part[places] for part in parts]
    result = varlen(
        *parts, ends, ends, max(lengths), max(lengths), scale=options.scale,
        window_size=(options.window - 1 if options.window else -1, 0),
        enable_gqa=call.shape.heads != call.shape.groups,
    )  # fmt: skip
    if places is None:
        call.out.copy_(result)
    else:
        call.out[places] = result
