"""Attention of several prompts at once equals attention one by one, and no memory grows as T x T."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.backend import Kernels, kernels_for
from engine.kernels.calls import AttentionCall, AttentionOptions, HeadShape
from engine.kernels.cpu import native
from engine.models import prompt_attention
from engine.models.attention import attend_rows
from engine.models.prompt_attention import attend_prompts
from tests.support.engine_allocations import LiveBytes

CPU = torch.device("cpu")
HEADS = st.sampled_from([(4, 4), (4, 2), (6, 1)])
LENGTHS = st.lists(st.sampled_from([1, 2, 5, 5, 9]), min_size=1, max_size=7)
OPTIONS = st.sampled_from([
    AttentionOptions(0.3), AttentionOptions(0.3, window=3), AttentionOptions(0.3, window=6),
    AttentionOptions(0.3, softcap=2.0), AttentionOptions(0.3, sinks=torch.linspace(-1, 1, 6)),
])  # fmt: skip


def defined(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """The definition of attention, [T, H, E], one head and one query after the other, in float64."""
    heads, tokens, _ = query.shape
    out = torch.empty(tokens, heads, value.shape[-1], dtype=torch.float64)
    for head in range(heads):
        group = head * len(key) // heads
        for position in range(tokens):
            low = max(0, position + 1 - options.window) if options.window else 0
            scores = key[group, low : position + 1].double() @ query[head, position].double() * options.scale
            if options.softcap is not None:
                scores = torch.tanh(scores / options.softcap) * options.softcap
            if options.sinks is not None:
                scores = torch.cat([scores, options.sinks[head : head + 1].double()])
            weights = torch.softmax(scores, 0)[: position + 1 - low]
            out[position, head] = weights @ value[group, low : position + 1].double()
    return out


def batch_of(
    lengths: list[int], heads: tuple[int, int], width: int, value_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed queries, keys and values, with a decoding token in front of and after the prompts."""
    tokens = sum(lengths) + 2
    shapes = ((heads[0], width), (heads[1], width), (heads[1], value_width))
    generator = torch.Generator().manual_seed(len(lengths))
    made = [torch.randn(tokens, count, wide, generator=generator).transpose(0, 1) for count, wide in shapes]
    return made[0], made[1], made[2]


def call_of(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions, out: Tensor
) -> AttentionCall:
    """Of queries, keys and values that are given head by head."""
    shape = HeadShape(len(query), len(key), query.shape[2], value.shape[2])
    parts = [part.transpose(0, 1) for part in (query, key, value)]
    return AttentionCall(parts[0], parts[1], parts[2], shape, options, out)


def kernels_of(kernel: bool) -> Kernels:
    """Those of a CPU, with or without the C kernel that attends to prompts."""
    return dataclasses.replace(kernels_for(CPU), attend_prompts=native.attend_prompts if kernel else None)


def check(
    kernel: bool, lengths: list[int], heads: tuple[int, int], value_width: int, options: AttentionOptions
) -> list[tuple[int, int]]:
    """Attend together, then one by one to what was left; compare all rows; returns what was left."""
    if options.sinks is not None:
        options = AttentionOptions(options.scale, sinks=options.sinks[: heads[0]])
    query, key, value = batch_of(lengths, heads, 8, value_width)
    starts = [1 + sum(lengths[:index]) for index in range(len(lengths))]
    out = torch.full((query.shape[1], heads[0], value_width), torch.nan)
    call = call_of(query, key, value, options, out)
    left = attend_prompts(call, list(zip(starts, lengths, strict=True)), kernels_of(kernel))
    for start, length in left:
        rows = slice(start, start + length)
        attend_rows(call, rows, call.key[rows], call.value[rows])
    for start, length in zip(starts, lengths, strict=True):
        rows = slice(start, start + length)
        expected = defined(query[:, rows], key[:, rows], value[:, rows], options)
        torch.testing.assert_close(out[rows].double(), expected, rtol=1e-5, atol=1e-5)
    assert out[0].isnan().all() and out[-1].isnan().all(), "rows of others are not touched"
    return left


@pytest.fixture(params=["C", "torch"])
def kernel(request: pytest.FixtureRequest) -> bool:
    """Whether the C kernel attends to prompts, which is asked for where torch could do it, too."""
    if request.param == "C" and not native.gains_by_prompts():
        pytest.skip("no C kernel that is worth while here")
    return bool(request.param == "C")


quick = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(lengths=LENGTHS, heads=HEADS, value_width=st.sampled_from([8, 4]), options=OPTIONS)
@settings(quick, max_examples=80)
def test_prompts_are_attended_together(
    kernel: bool, lengths: list[int], heads: tuple[int, int], value_width: int, options: AttentionOptions
) -> None:
    left = check(kernel, lengths, heads, value_width, options)
    plain = options.softcap is None and options.sinks is None
    if kernel:
        assert len(left) == (0 if plain else len(lengths))
        return
    assert len(left) == sum(not plain or (options.window or 99) < length for length in lengths)


@given(lengths=LENGTHS, heads=HEADS, options=OPTIONS)
@settings(quick, max_examples=50)
def test_the_variable_length_kernel_is_called_as_it_wants(
    lengths: list[int], heads: tuple[int, int], options: AttentionOptions
) -> None:
    """A function on the CPU with the documented arguments replaces torch's kernel."""
    calls = []

    def varlen(
        query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int,
        *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Any:  # fmt: skip
        calls.append(max_q)
        assert max_q == max_k == max(lengths) and ends_q.dtype == torch.int32 and torch.equal(ends_q, ends_k)
        assert window_size[1] == 0 and enable_gqa == (query.shape[1] != key.shape[1])
        out = torch.empty(*query.shape[:2], value.shape[-1])
        window = window_size[0] + 1 if window_size[0] >= 0 else None
        for begin, end in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True):
            parts = [part[begin:end].transpose(0, 1) for part in (query, key, value)]
            out[begin:end] = defined(parts[0], parts[1], parts[2], AttentionOptions(scale, window=window))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_attention, "varlen_for", lambda device, dtype: varlen)
        left = check(False, lengths, heads, 8, options)
    plain = options.softcap is None and options.sinks is None
    assert (len(calls), len(left)) == ((1, 0) if plain else (0, len(lengths)))


def test_the_variable_length_kernel_is_for_half_precision_on_cuda() -> None:
    assert prompt_attention.varlen_for(torch.device("cpu"), torch.float16) is None
    assert prompt_attention.varlen_for(torch.device("cuda"), torch.float32) is None


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("value_width", [16, 8])
@pytest.mark.parametrize("window", [None, 500])
def test_a_long_prompt_never_takes_tokens_by_tokens(
    kernel: bool, groups: int, value_width: int, window: int | None
) -> None:
    tokens, options, kernels = 2048, AttentionOptions(0.25, window=window), kernels_of(kernel)
    with torch.inference_mode():
        query, key = torch.randn(4, tokens, 16), torch.randn(groups, tokens, 16)
        value, out = torch.randn(groups, tokens, value_width), torch.empty(tokens, 4, value_width)
        watch = LiveBytes(allowed=lambda: 0)
        with watch:
            call = call_of(query, key, value, options, out)
            left = attend_prompts(call, [(0, tokens)], kernels)
            for _ in left:
                attend_rows(call, slice(0, tokens), call.key, call.value)
        assert (len(left) > 0) == (window is not None and not kernel)
        inputs = sum(part.nbytes for part in (query, key, value, out))
        assert watch.peak - inputs < 4 * tokens * tokens / 2, "a fraction of one head's scores"
